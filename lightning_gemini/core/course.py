"""What a step goes by."""

from __future__ import annotations

from enum import Enum


class Course(Enum):
    """What a step goes by."""

    NONE = "none"  #: no step is under way
    RECORDING = "recording"  #: least-recently-used, and what happens is written down
    FOLLOWING = "following"  #: the plan of a step that was recorded
    ASTRAY = "astray"  #: least-recently-used: no step that is known; what it does from there on is written down


#: Which may follow which.
COURSES = {
    (Course.NONE, Course.RECORDING),
    (Course.NONE, Course.FOLLOWING),
    (Course.NONE, Course.ASTRAY),
    (Course.FOLLOWING, Course.ASTRAY),
    (Course.RECORDING, Course.NONE),
    (Course.FOLLOWING, Course.NONE),
    (Course.ASTRAY, Course.NONE),
}
