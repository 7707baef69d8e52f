"""The second world's tests run in a process of their own: its modules have the first one's names."""

collect_ignore = ["second_world"]
