"""Imported by agsel's commands before anything that could be missing, which it then refuses in one line."""

from agsel.prerequisites import REQUIREMENTS, require_installed

require_installed(REQUIREMENTS)
