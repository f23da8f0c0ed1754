"""Errors whose text is for the user."""


class UserError(Exception):
    """Something the user can put right; the text says what is wrong, where, and how."""


class NotServed(UserError):
    """A model that is not served on a K80, whatever the settings; the text says what to use."""
