"""`lightningdit demo`: a page in the browser that draws images and shows how they come out of the noise.

    lightningdit demo --checkpoint runs/digits

The page is served on 127.0.0.1 only, sends nothing anywhere, and needs no network: no analytics, no fonts or scripts from elsewhere, which
its content security policy forbids to the browser too. One image is drawn at a time; who comes meanwhile waits in line.
"""
import contextlib
import math
import os
import queue
import signal
import tempfile
import threading
from pathlib import Path
from typing import Literal

import torch

from . import flow, pictures
from .config import require
from .distributed import pick_device
from .log import image_grid, save_png
from .sampler import initial_noise
from .trained import load_run

PREVIEWS = 24  # pictures on the way to an image, at most
LARGEST = dict(steps=1000, scale=100.0)  # what the page accepts
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'self'; frame-ancestors 'self'"
STYLE = """
.gradio-container {width: 960px !important; max-width: 100% !important; margin: auto}
footer {display: none !important}
#picture img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
"""


def demo(
    checkpoint: str,
    port: int = 7860,
    method: str | None = None,
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    device: str = "auto",
    config: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Serves a page on 127.0.0.1 that draws images: one chooses class, seed, guidance and steps, and sees the image come out of the noise.

    An image is that of `lightningdit sample` with the same class, seed and settings. Ctrl-C or SIGTERM ends it.

    Args:
        checkpoint: a run directory or one of its checkpoints; or official weights (.pt, .safetensors) with --config and --tokenizer.
        port: on this machine.
        method: euler, heun, midpoint, ab2, dpmpp_2m or unipc; none: the run's.
        precision: instead of the configuration's.
        device: auto, cpu or cuda.
        config: a recipe, where the checkpoint is not a run.
        tokenizer: a tokenizer file, a folder of diffusers, or "digits", where the checkpoint is not a run.
    """
    require(0 < port < 2**16, "port", port, "1 to 65535")
    gradio = import_gradio()
    device = pick_device(device)
    settings, model, decoder, names = load_run(checkpoint, config, tokenizer, device)
    settings.sample.method = method or settings.sample.method
    settings.precision = precision or settings.precision
    painter = Painter(settings, model, decoder, names, device)
    with tempfile.TemporaryDirectory(prefix="lightningdit_demo_") as folder:
        serve(gradio, page(gradio, painter, folder, title=Path(checkpoint).name), port)
    return 0


def import_gradio():
    """Gradio, told to be silent before it can speak. Raises: ImportError that names the pip command."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the demo needs gradio 6: pip install 'gradio>=6' ({error})") from None
    if int(gradio.__version__.partition(".")[0]) < 6:
        raise ImportError(f"the demo needs gradio 6 and found {gradio.__version__}: pip install 'gradio>=6'")
    return gradio


class Stopped(Exception):
    """The drawing was given up by who asked for it."""


class Painter:
    """Draws one image at a time and shows it on the way.

    Attributes: choices, the names of the classes; defaults, {"scale", "steps"} of the run.
    Raises: ValueError for a method whose way cannot be shown.
    """

    def __init__(self, settings, model, decoder, names, device):
        require(settings.sample.method in pictures.METHODS, "method", settings.sample.method,
                f"--method with one of {', '.join(pictures.METHODS)}, whose way can be shown")
        self.arguments = settings.sampling_arguments()
        self.model, self.decoder, self.device, self.bf16 = model, decoder, device, settings.use_bf16(device)
        self.choices = list(names) if names else [str(i) for i in range(settings.data.num_classes)]
        self.defaults = dict(scale=settings.sample.guidance_scale, steps=settings.sample.num_steps)
        self.stopping, self.one_at_a_time = threading.Event(), threading.Lock()

    def check(self, name, seed, scale, steps):
        """(label, seed, scale, steps) of what a visitor entered. Raises: ValueError that names the field."""
        require(name in self.choices, "Class", name, f"one of {', '.join(self.choices[:10])}{', ...' if len(self.choices) > 10 else ''}")
        require(_whole(seed) and 0 <= seed < 2**32, "Seed", seed, f"a whole number from 0 to {2**32 - 1}")
        require(_number(scale) and 0 <= scale <= LARGEST["scale"], "Guidance scale", scale, f"a number from 0 to {LARGEST['scale']:g}")
        require(_whole(steps) and 1 <= steps <= LARGEST["steps"], "Steps", steps, f"a whole number from 1 to {LARGEST['steps']}")
        return self.choices.index(name), int(seed), float(scale), int(steps)

    def draw(self, name, seed, scale, steps):
        """Yields (picture (H, W, 3) uint8, share of the work done): the predicted data every few evaluations, at last the image with 1.0.

        Raises: ValueError for what `check` refuses; sampler.Diverged; Stopped after `stop`.
        """
        label, seed, scale, steps = self.check(name, seed, scale, steps)
        with self.one_at_a_time:
            self.stopping.clear()
            shown = queue.SimpleQueue()
            worker = threading.Thread(target=self._work, args=(label, seed, scale, steps, shown), daemon=True)
            worker.start()
            try:
                while (item := shown.get()) is not None:
                    if isinstance(item, Exception):
                        raise item
                    yield item
            finally:
                self.stopping.set()  # also when nobody looks any more
                worker.join()

    def stop(self):
        """Ends what is being drawn at the next evaluation of the model."""
        self.stopping.set()

    def _work(self, label, seed, scale, steps, shown):
        path, prediction = self.arguments["path"], self.arguments["prediction"]
        evaluations, all_of_them = 0, steps * (2 if self.arguments["method"] in ("heun", "midpoint") else 1)
        every = math.ceil(all_of_them / PREVIEWS)

        def watch(x, t, output):
            nonlocal evaluations
            if self.stopping.is_set():
                raise Stopped
            if evaluations % every == 0:
                data = flow.data_from(output, x, torch.tensor(t), path, prediction)
                if bool(torch.isfinite(data).all()):  # if not, the end of it will say so
                    shown.put((self._picture(data), evaluations / all_of_them))
            evaluations += 1

        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                noise = initial_noise([seed], self.arguments["latent_shape"], self.device)
                latents = pictures.solve(self.model, noise, [label], watch=watch,
                                         **self.arguments | dict(guidance_scale=scale, num_steps=steps, device=self.device))
            shown.put((self._picture(latents), 1.0))
        except Exception as problem:  # goes on in the thread that asked
            shown.put(problem)
        finally:
            shown.put(None)

    def _picture(self, latents):
        return image_grid(pictures.decode(self.decoder, latents))


def _number(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def _whole(value):
    return _number(value) and value == int(value)


def page(gradio, painter, folder, title=""):
    """The gradio.Blocks of a Painter; finished images are put into `folder` for the download."""

    def draw(name, seed, scale, steps):
        yield gradio.skip(), "Waiting for the image before this one.", gradio.update(interactive=False)
        try:
            for picture, done in painter.draw(name, seed, scale, steps):
                if done < 1:
                    yield picture, f"{100 * done:.0f} % of the steps; this is the image that the model predicts by now.", gradio.skip()
        except Stopped:
            yield gradio.skip(), "Stopped.", gradio.skip()
            return
        except (ValueError, RuntimeError) as problem:
            yield gradio.skip(), f"**Not drawn.** {problem}", gradio.skip()
            return
        file = Path(folder) / f"{''.join(c if c.isalnum() else '_' for c in name)}_seed_{int(seed)}.png"
        save_png(picture, file)
        text = f"**{name}**, seed {int(seed)}, guidance {scale:g}, {int(steps)} steps"
        yield picture, text, gradio.update(value=str(file), interactive=True)

    with gradio.Blocks(title="LightningDiT", analytics_enabled=False, delete_cache=(600, 600)) as blocks:
        gradio.Markdown(f"## LightningDiT: images out of noise, by the model of {title}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=280):
                name = gradio.Dropdown(painter.choices, value=painter.choices[0], label="Class", elem_id="class")
                seed = gradio.Number(0, label="Seed", info="Another seed is another image.", elem_id="seed")
                scale = gradio.Number(painter.defaults["scale"], label="Guidance scale", elem_id="scale", step=0.1,
                                      info="1: none. More: closer to the class, less varied.")
                steps = gradio.Number(painter.defaults["steps"], label="Steps", info="More: more exact, slower.", elem_id="steps")
                with gradio.Row():
                    go = gradio.Button("Draw", variant="primary", elem_id="draw", min_width=100)
                    stop = gradio.Button("Stop", elem_id="stop", min_width=100)
            with gradio.Column(scale=3, min_width=320):
                picture = gradio.Image(label="Image", format="png", interactive=False, height=380, buttons=["fullscreen"],
                                       elem_id="picture")
                status = gradio.Markdown("Choose a class and press *Draw*.", elem_id="status")
                file = gradio.DownloadButton("Download PNG", interactive=False, elem_id="download")
        one = dict(fn=draw, inputs=[name, seed, scale, steps], outputs=[picture, status, file], concurrency_limit=1, concurrency_id="draw",
                   show_progress="hidden")
        go.click(**one, api_name="draw")
        seed.submit(**one, api_visibility="private")
        stop.click(painter.stop, queue=False, api_name="stop")
    return blocks


class Policy:
    """ASGI middleware: tells the browser to fetch nothing from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY)]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(gradio, blocks, port):
    """Serves the page on 127.0.0.1 until Ctrl-C or SIGTERM. Raises: OSError where the port is taken."""
    from starlette.middleware import Middleware

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # those of the machine
    blocks.queue(max_size=32)
    print(f"http://127.0.0.1:{port}   Ctrl-C ends it", flush=True)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            blocks.launch(server_name="127.0.0.1", server_port=port, share=False, inbrowser=False, ssr_mode=False, mcp_server=False,
                          pwa=False, quiet=True, enable_monitoring=False, run_history=False, theme=theme, css=STYLE, footer_links=[],
                          app_kwargs=dict(middleware=[Middleware(Policy)]))
    finally:
        blocks.close()
