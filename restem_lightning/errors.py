"""The exception for mistakes that a user can mend; the command line prints it without a trace."""


class UserError(ValueError):
    """A user's mistake: the message names the value, what is allowed and the remedy."""
