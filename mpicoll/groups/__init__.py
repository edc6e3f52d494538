"""The user's object, and how groups come to be out of others."""
