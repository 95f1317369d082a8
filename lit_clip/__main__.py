"""``python -m lit_clip`` is ``lit-clip``."""

from lit_clip.cli.main import main

if __name__ == "__main__":
    main()
