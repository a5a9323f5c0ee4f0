"""Ask a picture a question; alone, it runs the small embedded model on its example. See himap_ref/commands/ask.py."""

import sys

if __name__ == "__main__":
    try:
        from himap_ref.commands.ask import run  # torch with it, which takes seconds
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install -e . (in the folder of this file) brings it")
    except KeyboardInterrupt:
        sys.exit(130)
    run()
