"""Errors whose text is for the user."""


class UserError(Exception):
    """Something the user can put right; the text says what is wrong, where, and how."""
