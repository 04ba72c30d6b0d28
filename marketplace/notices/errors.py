"""What can go wrong with notices.

NoticeError
├── NoticeRefusal          the caller is told
│   ├── UnsafeUrl          a webhook address that we will not call
│   ├── TooManyWebhooks    this person has enough of them
│   └── NoSuchWebhook      nothing of this person's has this id
└── NotDelivered           this attempt failed; it is made again later
"""

from __future__ import annotations


class NoticeError(Exception):
    """Root of everything this package raises on purpose."""


class NoticeRefusal(NoticeError):
    """The caller is told why not."""


class UnsafeUrl(NoticeRefusal):
    """A webhook address that we will not call."""


class TooManyWebhooks(NoticeRefusal):
    """This person has enough webhooks."""


class NoSuchWebhook(NoticeRefusal):
    """Nothing of this person's has this id."""


class NotDelivered(NoticeError):
    """This attempt failed; the message says how, and nothing secret."""
