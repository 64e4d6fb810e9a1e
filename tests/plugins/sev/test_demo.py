from __future__ import annotations

from sevlab.plugins.sev import demo


def test_the_chapter_tells_the_same_story_twice_and_only_the_guest_reads_the_secret():
    stories = []
    for _ in range(2):
        lines = []
        demo.chapter(lines.append)
        stories.append(lines)
    assert stories[0] == stories[1]
    readers = [line for line in stories[0] if "correct horse battery st" in line]
    assert len(readers) == 1
    assert "guest" in readers[0]
    assert any("with one bit changed on the way: BAD_MEASUREMENT" in line for line in stories[0])
    assert not any("NOT" in line for line in stories[0])
