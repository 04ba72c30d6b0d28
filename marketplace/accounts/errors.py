"""What accounts refuse.

AccountError
├── AccountRefusal          the caller cannot have this; `routes` maps each to one HTTP answer
│   ├── EmailTaken
│   ├── WrongCredentials    e-mail or password, never saying which
│   ├── BadChallenge        a wallet's answer that proves nothing: unknown, used, expired, wrong signature
│   ├── WalletTaken         the wallet signs in another person
│   ├── PersonFrozen
│   ├── PersonUnknown
│   ├── ScopeNotHeld        a key cannot be given what its maker does not have
│   └── TooManyKeys
└── AccountFault            the environment failed; asking again may help
    ├── KeysUnavailable     the keys could not be read from the database
    └── HashingBusy         too many passwords are waiting to be checked
"""

from __future__ import annotations


class AccountError(Exception):
    """Root of everything accounts raise on purpose."""


class AccountRefusal(AccountError):
    """The caller cannot have this."""


class EmailTaken(AccountRefusal):
    """Another person signs in with this e-mail address."""


class WrongCredentials(AccountRefusal):
    """The e-mail address or the password is wrong."""


class BadChallenge(AccountRefusal):
    """The wallet's answer proves nothing."""


class WalletTaken(AccountRefusal):
    """The wallet signs in another person."""


class PersonFrozen(AccountRefusal):
    """An administrator has stopped this account."""


class PersonUnknown(AccountRefusal):
    """No such person."""


class ScopeNotHeld(AccountRefusal):
    """The person does not have what the key should be given."""


class TooManyKeys(AccountRefusal):
    """The person has as many live keys as one may have."""


class AccountFault(AccountError):
    """The environment failed; asking again may help."""


class KeysUnavailable(AccountFault):
    """The keys could not be read from the database."""


class HashingBusy(AccountFault):
    """Too many passwords are waiting to be checked."""
