"""A simulated market: people with known taste, the log of what they do, and what they do when shown items."""

from longretriever.market.log import Log, Market, MarketConfig

__all__ = ["Log", "Market", "MarketConfig"]
