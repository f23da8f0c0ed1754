"""Errors whose text is for the user."""


class UserError(Exception):
    """Something the user can put right; the text says what is wrong, where, and how."""


class BadSetting(UserError):
    """A setting that this model cannot be served with, as no server would take it."""


class NotServed(UserError):
    """A model that is not served on a K80, whatever the settings; the text says what to use."""
