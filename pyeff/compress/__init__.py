"""Compression: networks that learn their own size while they train."""

from pyeff.compress.groups import ChannelGroup, ChannelMap, Member, channel_groups, map_channels

__all__ = ["ChannelGroup", "ChannelMap", "Member", "channel_groups", "map_channels"]
