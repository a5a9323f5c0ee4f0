"""A page to play with, on this machine: python -m himap_ref.demo [--weights llava-1.5-7b --device cuda]"""

from __future__ import annotations

import argparse
import os
import socket
import warnings

from ..commands.manners import run_command
from ..commands.options import EMBEDDED, add_model_arguments, is_embedded, load_model
from ..commands.picture import DRAWN
from ..errors import HimapError
from ..methods.reducers import check_grid

LOCAL = ("127.0.0.1", "localhost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    add_model_arguments(parser)
    parser.add_argument("--host", default=LOCAL[0], help="address to listen at; default: for this machine alone")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--allow-code", action="store_true",
                        help="a box for a criterion of your own, which runs as you: on this machine alone")  # fmt: skip
    args = parser.parse_args()
    if args.allow_code and args.host not in LOCAL:
        raise HimapError(f"--allow-code lets whoever opens the page run code as you: not with --host {args.host}")
    try:
        socket.create_server((args.host, args.port)).close()
    except (OSError, OverflowError) as error:
        raise HimapError(f"cannot listen at {args.host}:{args.port} ({error}): choose another --port") from None
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: Gradio reports to its makers
    try:
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError:
        raise HimapError("the page needs Gradio: pip install -e '.[demo]'") from None
    from .page import build_page

    warnings.filterwarnings("ignore", message="Image size")  # Pillow, at half of its limit
    model, _ = load_model(args)
    check_grid(model.config, *DRAWN)
    example = (EMBEDDED / "example.png", "What color is the star?") if is_embedded(args.weights) else None
    # Without this a web page could name its own host 127.0.0.1 (DNS rebinding) and talk to this one.
    hosts = [*LOCAL] if args.host in LOCAL else ["*"]
    build_page(model, example, args.allow_code).launch(
        server_name=args.host, server_port=args.port, share=False, max_file_size="20mb", ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # not Google's, by network
        footer_links=[], app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)]},
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
