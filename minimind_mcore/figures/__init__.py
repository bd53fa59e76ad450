"""The figures of the chapters in docs/: numbers from models that `minimind-mcore docs figures` trains."""
