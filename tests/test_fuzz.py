"""Random damage: every wrong configuration and every changed byte of a checkpoint is an error with words, never a crash, never accepted.

`make test` tries some hundred inputs, `make fuzz` thousands. Latent stores, archives, images and tokenizers: where those are tested.
"""
import json
import shutil

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bench.fuzz import examples, tally
from lightningdit import checkpoint
from lightningdit.config import ConfigError, DiTConfig, EncodeConfig, VAVAEConfig, load, save
from lightningdit.run import Incidents

pytestmark = pytest.mark.fuzz
FUZZ = examples(60)
SCALARS = (st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=12)
           | st.sampled_from(["auto", "digits", "XL/1", "nan", "1e-4", "", [], {}]))
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
                      max_leaves=6)
CLASSES = (DiTConfig, VAVAEConfig, EncodeConfig)


def near(value):
    """Values of the same type, many of them valid."""
    if isinstance(value, bool):
        return st.booleans()
    if isinstance(value, int):
        return st.integers(-1, 2 * abs(value) + 8)
    return st.floats(0, 2) | st.floats() if isinstance(value, float) else VALUES


def places(values, prefix=()):
    """The paths of all settings of a nested dictionary."""
    for key, value in values.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from places(value, (*prefix, key))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """{class: its defaults as YAML writes them}, of settings that are valid."""
    found = {}
    for cls, first in ((DiTConfig, {}), (VAVAEConfig, dict(steps=3, data=dict(path="photos"))), (EncodeConfig, dict(
            tokenizer=dict(path="digits"), data=dict(path="photos")))):
        path = tmp_path_factory.mktemp("whole") / "config.yaml"
        path.write_text(yaml.safe_dump(first))
        save(load(cls, path), path)
        found[cls] = yaml.safe_load(path.read_text())
    return found


@FUZZ
@given(st.data())
def test_configurations_are_loaded_or_refused_with_words(whole, tmp_path, data):
    """A setting or two get another value or name. What is accepted survives a round trip; what is refused names the setting."""
    cls = data.draw(st.sampled_from(CLASSES))
    values, path = json.loads(json.dumps(whole[cls])), tmp_path / "config.yaml"
    touched = set()
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, name = data.draw(st.sampled_from(sorted(places(values))))
        inner = values
        for parent in parents:
            inner = inner[parent]
        if data.draw(st.integers(0, 4)) == 0:
            name = data.draw(st.text(max_size=8))
        inner[name] = data.draw(near(inner.get(name)) if data.draw(st.booleans()) else VALUES)
        touched.add(".".join([*parents, name]))
    path.write_text(yaml.safe_dump(values))
    try:
        config = load(cls, path)
    except ConfigError as error:
        assert ": " in str(error) and len(str(error)) > 20, error
        return tally("configurations", "refused")
    save(config, path)
    assert str(load(cls, path)) == str(config), touched
    tally("configurations", "valid")


@FUZZ
@given(st.one_of(st.text(max_size=60), st.binary(max_size=60), VALUES.map(yaml.safe_dump)))
def test_files_that_are_no_configuration(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        load(DiTConfig, path)
        tally("configuration files", "valid")
    except ConfigError as error:
        assert str(error)
        tally("configuration files", "refused")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint of two groups."""
    folder = tmp_path_factory.mktemp("run")
    tensors = {name: {"blocks.0.weight": torch.arange(40.0).view(8, 5), "bias": torch.arange(3)} for name in ("model", "ema")}
    checkpoint.save_checkpoint(folder, 7, tensors, dict(seed=3, classes=["a", "b"], data="0123"))
    return folder


def mutated(data, draw):
    """Other bytes than these: some changed, put in, or cut off."""
    how, place = draw(st.sampled_from(["change", "insert", "cut", "repeat"])), draw(st.integers(0, len(data) - 1))
    if how == "change":
        return data[:place] + bytes([data[place] ^ draw(st.integers(1, 255))]) + data[place + 1 :]
    if how == "insert":
        return data[:place] + draw(st.binary(min_size=1, max_size=9)) + data[place:]
    return data[:place] if how == "cut" else data + data[place:]


@FUZZ
@given(st.data())
def test_a_changed_checkpoint_is_refused_by_name(run, tmp_path, data):
    """Only white space and the like in state.json, which change no value, may pass."""
    target = tmp_path / "run"
    if not target.exists():
        shutil.copytree(run, target)
    path = target / "checkpoints" / "step_0000007"
    names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if file.is_file()]
    name = data.draw(st.sampled_from([*names, "state.json"]))
    before = (path / name).read_bytes()
    (path / name).write_bytes(mutated(before, data.draw))
    warnings = []
    try:
        found = checkpoint.latest_checkpoint(target, warn=warnings.append)
        if found is None:
            assert len(warnings) == 1 and name in warnings[0]
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.load_weights(target)
            tally("checkpoints", "refused")
        else:
            assert name == "state.json" and found[1] == {k: v for k, v in json.loads(before).items() if k != "sha256"}
            tally("checkpoints", "no value changed")
    finally:
        (path / name).write_bytes(before)


@FUZZ
@given(st.data())
def test_changed_weight_files_are_read_or_refused(tmp_path, data):
    """Files of other programs have no checksum: what is read are tensors, what is not is named."""
    name = data.draw(st.sampled_from(["weights.pt", "weights.safetensors"]))
    path = tmp_path / name
    checkpoint.save_weights(path, {"blocks.0.weight": torch.arange(40.0).view(8, 5), "bias": torch.arange(3)})
    path.write_bytes(mutated(path.read_bytes(), data.draw))
    try:
        state = checkpoint.load_weights(path)
        assert all(torch.is_tensor(tensor) for tensor in state.values())
        tally("weight files", "read, no checksum")
    except checkpoint.CheckpointError as error:
        assert name in str(error)
        tally("weight files", "refused")


@FUZZ
@given(VALUES | st.dictionaries(st.sampled_from(["left_out", "lr_factor"]), VALUES, min_size=2))
def test_incidents_are_read_or_refused(tmp_path, values):
    (tmp_path / "incidents.json").write_text(json.dumps(values))
    try:
        found = Incidents(tmp_path, "stop", 3, 1.0)
        assert all(isinstance(step, int) for step in found.left_out) and isinstance(found.lr_factor, float)
        tally("incidents.json", "valid")
    except ConfigError as error:
        assert "incidents.json is damaged" in str(error)
        tally("incidents.json", "refused")
