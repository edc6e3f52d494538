"""Tests on several ranks: a plugin for pytest, and what authors of backends inherit."""
