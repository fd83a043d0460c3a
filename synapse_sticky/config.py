import attr


@attr.s(auto_attribs=True, frozen=True, slots=True)
class JoinsConfig:
    enabled: bool = True
    window: int = 48
    retry_min_ms: int = 500
    retry_max_ms: int = 300000
    confirm: bool = True


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StagingConfig:
    keep_sticky: bool = True


@attr.s(auto_attribs=True, frozen=True, slots=True)
class VisibilityConfig:
    servers: bool = True


@attr.s(auto_attribs=True, frozen=True, slots=True)
class StickyConfig:
    joins: JoinsConfig = JoinsConfig()
    staging: StagingConfig = StagingConfig()
    visibility: VisibilityConfig = VisibilityConfig()


def parse(config: object) -> StickyConfig:
    return StickyConfig()
