"""The commands, one module each; a module imports what its command needs only when the command runs."""
