"""What can go wrong, as decisions that a caller could take.

Every error is one line for a person: what was refused, where, which limit it broke, what to do. Errors never carry
photos, labels or counts. Only the doors (command line, node, server application) catch them.
"""


class FedgradeError(Exception):
    """Base of every refusal by fedgrade; its text is meant for the person at the terminal."""


class DocumentRefused(FedgradeError):
    """Bytes that should have been a document are malformed, oversized or not of the promised shape."""


class SignatureRefused(FedgradeError):
    """A signature is missing, wrong, or by a key that the roster does not name for this role."""


class LedgerBroken(FedgradeError):
    """A ledger entry does not follow from the one before it; names the first broken entry."""


class LedgerUnavailable(FedgradeError):
    """The ledger could not be written durably (full disk, second writer); nothing was charged."""


class CacheUnavailable(FedgradeError):
    """What a site keeps so as not to compute it again could not be kept (full disk); nothing was charged."""


class StoreUnavailable(FedgradeError):
    """What a coordinator must keep could not be kept (full disk, a database that is away); what was kept stands."""


class BudgetExceeded(FedgradeError):
    """A release would take an account past the partner's own ceiling."""


class PolicyViolated(FedgradeError):
    """A job asks for something the partner's policy file forbids."""


class SiteWaits(FedgradeError):
    """The partner's own rules say not now: closed hours, a person to ask, a policy file that cannot be read."""


class PlanRefused(FedgradeError):
    """A privacy plan is impossible, or two accountants disagree about what it costs."""


class DataRefused(FedgradeError):
    """A manifest or photo is malformed, changed, dangerous or out of scale."""


class ModelRefused(FedgradeError):
    """Weights, a model file or an update have the wrong digest, shape, type or range."""


class JobRefused(FedgradeError):
    """A configuration or sealed job is unknown, mistyped or impossible."""


class RoundFailed(FedgradeError):
    """A round could not gather the replies it needs; the checkpoint before it stands."""


class MessageRefused(FedgradeError):
    """A wire message is stale, replayed, addressed elsewhere or out of order."""


class AttemptOver(MessageRefused):
    """An attempt at a secure sum cannot be gone on with here; nobody lied, and a further attempt may succeed."""


class AlreadyCharged(MessageRefused):
    """This attempt of a round was charged before and its reply is lost; only a further attempt can succeed."""
