"""What a person starts: the command line, its commands and their presets."""
