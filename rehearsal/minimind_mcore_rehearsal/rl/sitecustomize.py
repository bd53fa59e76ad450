"""Python imports this module in every process with this folder on PYTHONPATH, also in Ray's workers."""

import rehearsal_names

rehearsal_names.install()
