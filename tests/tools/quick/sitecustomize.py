"""Python imports this by itself if the folder is in PYTHONPATH: see quick_python in conftest.py."""

import atexit
import gc

gc.disable()
atexit.register(gc.freeze)  # or the end looks at each object once more
