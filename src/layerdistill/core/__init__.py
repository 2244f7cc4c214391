"""The words every other package speaks; imports nothing of ours from outside `core`."""
