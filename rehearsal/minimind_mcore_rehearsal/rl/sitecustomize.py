"""Python runs this in every process, Ray's workers too, where this folder is on PYTHONPATH."""

import rehearsal_names

rehearsal_names.install()
