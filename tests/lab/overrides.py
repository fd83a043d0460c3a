"""Where the lab's homeservers differ from Synapse's own defaults, and why. Everything else is as
Synapse has it: its limits on other servers' requests, and its caches."""

from typing import Any

_OPEN = {"per_second": 10_000, "burst_count": 100_000}

OVERRIDES: dict[str, dict[str, Any]] = {
    "The servers are on loopback, with certificates of their own.": {
        "trusted_key_servers": [],
        "federation_verify_certificates": False,
        "ip_range_blacklist": [],
        "federation_ip_range_blacklist": [],
    },
    "A test's few users do within seconds what many users do in an hour.": {
        "rc_message": _OPEN,
        "rc_delayed_event_mgmt": _OPEN,
        "rc_registration": _OPEN,
        "rc_login": {"address": _OPEN, "account": _OPEN, "failed_attempts": _OPEN},
        "rc_joins": {"local": _OPEN, "remote": _OPEN},
        "rc_joins_per_room": _OPEN,
        "rc_room_creation": _OPEN,
        "rc_admin_redaction": _OPEN,
        "rc_invites": {"per_room": _OPEN, "per_user": _OPEN, "per_issuer": _OPEN},
    },
    "Backing off takes seconds, not minutes.": {
        "federation": {
            "client_timeout": "20s",
            "max_short_retry_delay": 500,
            "max_long_retry_delay": "2s",
            "max_long_retries": 3,
            "destination_min_retry_interval": "1s",
            "destination_max_retry_interval": "3s",
            "destination_retry_multiplier": 2,
        },
    },
    "Sticky events are switched on, and delayed ones as MatrixRTC needs them.": {
        "experimental_features": {"msc4354_enabled": True},
        "max_event_delay_duration": "24h",
    },
    "No work is done that no test looks at.": {
        "presence": {"enabled": False},
        "bcrypt_rounds": 4,
        "report_stats": False,
    },
}
"""Parts of homeserver.yaml by the reason for them: five at most."""
