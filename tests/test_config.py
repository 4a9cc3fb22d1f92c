"""Configuration: one default each, YAML over it, command line over that, and errors that name the field."""
import resource
import signal
from pathlib import Path

import pytest

from lightningdit import config as configuration
from lightningdit.config import ConfigError, DiTConfig

CONFIGS = Path(__file__).parent.parent / "train" / "configs"


def parse(*argv, recipe=None):
    return configuration.parse(DiTConfig, argv, recipe=recipe)


def test_a_configuration_that_cannot_be_written_leaves_the_old_one(tmp_path):
    """As on a full disk, which refuses bytes, not names: a resumption writes config.yaml anew, and must not cost the run."""
    path = tmp_path / "config.yaml"
    configuration.save(DiTConfig(steps=3), path)
    before = path.read_bytes()

    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))  # the kernel refuses all further bytes of a file
        with pytest.raises(OSError, match=f"could not write {path}: "):
            configuration.save(DiTConfig(steps=4), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_layers_override_each_other(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("steps: 10\noptim: {lr: 3, betas: [0.9, 0.99]}\nmodel: {size: S/2, depth: 3}\n")
    config = parse("--optim.lr", "0.5", recipe=recipe)
    assert (config.steps, config.optim.lr, config.optim.betas, config.batch_size) == (10, 0.5, (0.9, 0.99), 1024)
    assert (config.model.depth, config.model.hidden_size, config.model.patch_size) == (3, 384, 2)
    assert parse("--config", str(recipe)) == parse(f"--config={recipe}") == parse(recipe=recipe)


def test_saved_configuration_reads_back_equal(tmp_path):
    config = parse("--model.size", "B/2", "--sample.guidance-interval", "0.1", "0.9", "--compile", "--optim.clip-grad-norm", "1.5")
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(DiTConfig, tmp_path / "config.yaml") == config


@pytest.mark.parametrize("text, message", [
    ("stepz: 10", "stepz: unknown key; did you mean steps?"),
    ("optim: {learning_rate: 1}", "optim.learning_rate: unknown key; expected lr, name"),
    ("steps: ten", "steps: got 'ten', expected int"),
    ("steps: true", "steps: got True, expected int"),
    ("optim: {lr: 2e-4}", "1.0e-4"),
    ("compile: 1", "compile: got 1, expected bool"),
    ("optim: {betas: [0.9]}", "optim.betas: got [0.9], expected a list of 2 float values"),
    ("optim: {betas: [0.9, x]}", "optim.betas[1]: got 'x', expected float"),
    ("flow: {path: quadratic}", "flow.path: got 'quadratic', expected one of linear, gvp, vp"),
    ("model: 3", "model: got 3, expected a mapping"),
    ("- 1", "expected a mapping"),
    ("a: [", "is not valid YAML"),
])
def test_bad_yaml(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        configuration.load(DiTConfig, path)
    assert message in str(error.value)


@pytest.mark.parametrize("argv, message", [
    ("--model.size XS/3", "model.size: got 'XS/3', expected one of S/1"),
    ("--model.hidden-size 100 --model.num-heads 3", "model.hidden_size: got 100, expected a multiple of model.num_heads = 3"),
    ("--model.hidden-size 36 --model.num-heads 6", "model.hidden_size / model.num_heads: got 6, expected a multiple of 4"),
    ("--data.image-size 250", "data.image_size: got 250, expected a multiple of tokenizer.downsample = 16"),
    ("--model.size XL/2 --data.image-size 272", "do not divide by model.patch_size = 2"),
    ("--micro-batch 300", "micro_batch: got 300, expected a divisor of batch_size = 1024"),
    ("--steps 0", "steps: got 0, expected a positive number"),
    ("--optim.warmup 10 --steps 10", "optim.warmup: got 10, expected fewer than steps"),
    ("--sample.guidance-interval 0.5 0.1", "sample.guidance_interval"),
    ("--sample.guidance-channels 64", "at most tokenizer.latent_channels = 32"),
    ("--flow.prediction noise", "flow.cosine_loss: got True, expected false"),
    ("--data.val-fraction 1", "data.val_fraction: got 1.0, expected a fraction in [0, 1)"),
    ("--optim.state 8bit --parallel fsdp", "optim.state: got '8bit', expected fp32 or cpu with parallel = fsdp"),
    ("--optim.state cpu --optim.name muon", "optim.state: got 'cpu', expected fp32 with optim.name = muon"),
    ("--config nowhere.yaml", "no file nowhere.yaml"),
    ("--config", "--config needs a file"),
])
def test_impossible_combinations(argv, message):
    with pytest.raises(ConfigError) as error:
        parse(*argv.split())
    assert message in str(error.value)


@pytest.mark.parametrize("argv, message", [("--steps abc", "--steps"), ("--nonsense 3", "nonsense")])
def test_command_line_errors_name_the_argument(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        parse(*argv.split())
    assert error.value.code == 2 and message in "".join(capsys.readouterr())


def test_paper_recipes_state_the_official_values():
    short, long = (configuration.load(DiTConfig, CONFIGS / f"lightningdit_xl_{n}ep.yaml") for n in (64, 800))
    for config, steps, scale, start, switch in ((short, 80_000, 10.0, 0.10, None), (long, 1_000_000, 6.7, 0.125, 600_000)):
        model, flow, optim, sample = config.model, config.flow, config.optim, config.sample
        assert (config.steps, config.batch_size, model.depth, model.hidden_size, config.latent_size) == (steps, 1024, 28, 1152, 16)
        assert (optim.lr, optim.betas, optim.weight_decay, optim.ema, optim.clip_grad_norm) == (2e-4, (0.9, 0.95), 0, 0.9999, None)
        assert (optim.warmup, optim.schedule, optim.ema_warmup) == (0, "constant", False)
        assert model.use_swiglu and model.use_rope and model.use_rmsnorm and not model.use_qknorm and not model.wo_shift
        assert (flow.path, flow.prediction, flow.cosine_loss, flow.time) == ("linear", "velocity", True, "logit_normal")
        assert flow.time_switch_step == switch
        assert (sample.method, sample.num_steps, sample.shift, sample.guidance_channels) == ("euler", 249, 0.3, 3)
        assert (sample.guidance_scale, sample.guidance_interval) == (scale, (start, 1.0))
    epoch = 1_281_167 / 1024
    assert round(short.steps / epoch) == 64 and round(long.steps / epoch) in (799, 800)


def test_every_recipe_parses():
    for path in CONFIGS.glob("*.yaml"):
        if not path.name.startswith("vavae"):
            assert configuration.load(DiTConfig, path).run.startswith("runs/")
