"""Input devices, each fed with the bytes that the real one sends."""

import contextlib
import os
import struct
from pathlib import Path

import pytest

from robot_bridge.devices.gamepad import Gamepad
from robot_bridge.devices.keyboard import ESCAPE_S, FIRST_S, REPEAT_S, Keyboard
from robot_bridge.devices.spacemouse import SpaceMouse, find


class Clock:
    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def pipe(tmp_path):
    """A device file, and the end that the kernel would write to."""
    path = tmp_path / "device"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # keeps what is written before it is opened
    writer = os.open(path, os.O_WRONLY)
    yield path, writer
    os.close(reader)
    with contextlib.suppress(OSError):  # the test unplugged it
        os.close(writer)


def js_event(kind: int, number: int, value: int) -> bytes:
    """struct js_event of linux/joystick.h: u32 time, s16 value, u8 type, u8 number."""
    return struct.pack("=IhBB", 123_456, value, kind, number)


class TestGamepad:
    def test_buttons_axes_and_the_state_at_opening(self, pipe, clock):
        path, kernel = pipe
        pad = Gamepad(path, now=clock)
        # At opening the kernel reports everything with 0x80 set; a held button is no press.
        os.write(kernel, js_event(0x81, 5, 1) + js_event(0x81, 0, 0) + js_event(0x82, 1, -32767))
        reading = pad.read()
        assert reading.present
        assert reading.held == {"rb"}
        assert reading.pressed == ()
        assert reading.axes == {"left_y": -1.0}
        os.write(kernel, js_event(1, 0, 1) + js_event(1, 0, 0) + js_event(1, 5, 0))
        reading = pad.read()
        assert reading.pressed == ("a",)  # a press between two looks is not missed
        assert reading.held == frozenset()
        os.write(kernel, js_event(2, 1, 16384) + js_event(2, 6, -32767) + js_event(1, 12, 1))
        reading = pad.read()
        assert reading.axes["left_y"] == pytest.approx(0.5, abs=1e-4)
        assert reading.pressed == ("dpad_left", "b12")
        os.write(kernel, js_event(2, 6, 0))
        assert pad.read().held == {"b12"}
        pad.close()

    def test_an_event_that_arrives_in_two_parts_is_joined(self, pipe, clock):
        path, kernel = pipe
        pad = Gamepad(path, now=clock)
        event = js_event(1, 1, 1)
        os.write(kernel, event[:3])
        assert pad.read().held == frozenset()
        os.write(kernel, event[3:])
        assert pad.read().held == {"b"}
        pad.close()

    def test_unplugged_it_holds_nothing_and_it_comes_back(self, pipe, clock, tmp_path):
        path, kernel = pipe
        pad = Gamepad(path, now=clock)
        os.write(kernel, js_event(1, 5, 1))
        assert pad.read().held == {"rb"}
        os.close(kernel)
        reading = pad.read()
        assert not reading.present
        assert reading.held == frozenset()
        assert "unplugged" in reading.problem
        path.rename(tmp_path / "gone")
        clock.s += 2.0
        assert "No such file" in pad.read().problem
        (tmp_path / "gone").rename(path)
        again = os.open(path, os.O_WRONLY)
        assert not pad.read().present  # not tried again within a second
        clock.s += 2.0
        assert pad.read().present
        os.write(again, js_event(0x81, 5, 1))
        assert pad.read().held == {"rb"}
        os.close(again)
        pad.close()

    @pytest.mark.skipif(not os.access("/dev/uinput", os.W_OK), reason="no /dev/uinput here")
    def test_a_virtual_pad_of_the_kernel(self):
        evdev = pytest.importorskip("evdev")
        keys = {evdev.ecodes.EV_KEY: [evdev.ecodes.BTN_A, evdev.ecodes.BTN_B]}
        before = set(Path("/dev/input").glob("js*"))
        with evdev.UInput(keys, name="vla-post test pad") as kernel:
            made = set(Path("/dev/input").glob("js*")) - before
            if not made:
                pytest.skip("the kernel's joydev module is not loaded")
            pad = Gamepad(made.pop())
            pad.read()
            kernel.write(evdev.ecodes.EV_KEY, evdev.ecodes.BTN_A, 1)
            kernel.syn()
            assert "a" in pad.read().held
            pad.close()


class TestSpaceMouse:
    # A click of the left button, and the first reports of a tap on a SpaceNavigator's top, as its
    # owner printed /dev/hidraw2 (T. Wellman, "How to get started reverse engineering SpaceNavigator
    # peripheral data stream?", read at codedump.io/share/milpUqOhESZ8).
    CLICK = ("03 01 00", "03 00 00")
    TAP = (
        "01 f8 ff 14 00 55 00", "02 00 00 15 00 00 00",
        "01 00 00 b0 ff 04 00", "02 a5 ff 00 00 00 00",
    )  # fmt: skip

    def test_a_recorded_click_and_tap(self, pipe, clock):
        path, kernel = pipe
        mouse = SpaceMouse(path, now=clock)

        def send(report: str):
            os.write(kernel, bytes.fromhex(report))
            return mouse.read()

        down = send(self.CLICK[0])
        assert down.held == {"button0"}
        assert down.pressed == ("button0",)
        assert send(self.CLICK[1]).held == frozenset()
        axes = send(self.TAP[0]).axes
        # x -8, y 20, z 85 in the device's frame: pushed down and a little towards the user.
        assert [axes[a] * 350 for a in "xyz"] == pytest.approx([-8, -20, -85])
        axes = send(self.TAP[1]).axes
        assert [axes[a] * 350 for a in ("rx", "ry", "rz")] == pytest.approx([0, -21, 0])
        axes = send(self.TAP[2]).axes
        assert [axes[a] * 350 for a in "xyz"] == pytest.approx([0, 80, -4])
        axes = send(self.TAP[3]).axes
        assert axes["rx"] * 350 == pytest.approx(-91)
        os.close(kernel)
        gone = mouse.read()
        assert not gone.present
        assert gone.axes == {}
        mouse.close()

    def test_newer_models_send_six_axes_in_one_report_and_values_are_bounded(self, pipe, clock):
        path, kernel = pipe
        mouse = SpaceMouse(path, now=clock)
        os.write(kernel, b"\x01" + struct.pack("<6h", 350, -350, 0, 900, 0, -175))
        axes = mouse.read().axes
        assert axes == {"x": 1.0, "y": 1.0, "z": 0.0, "rx": 1.0, "ry": 0.0, "rz": 0.5}
        os.write(kernel, b"\x17\x64")  # battery
        assert mouse.read().axes == axes
        mouse.close()

    def test_it_is_found_by_its_vendor(self, tmp_path):
        def plug(name: str, hid: str) -> None:
            folder = tmp_path / name / "device"
            folder.mkdir(parents=True)
            (folder / "uevent").write_text(f"DRIVER=hid-generic\nHID_ID={hid}\nHID_NAME=x\n")

        plug("hidraw0", "0003:0000046D:0000C52B")  # Logitech's keyboard receiver
        with pytest.raises(FileNotFoundError, match="plug one in"):
            find(tmp_path)
        plug("hidraw1", "0003:0000046D:0000C626")
        assert find(tmp_path) == Path("/dev/hidraw1")
        plug("hidraw00", "0003:0000256F:0000C635")
        assert find(tmp_path) == Path("/dev/hidraw00")


class TestKeyboard:
    @pytest.fixture
    def terminal(self, clock):
        """(keyboard, write(bytes) as the terminal, what it was told)."""
        person, tty = os.openpty()
        keyboard = Keyboard(tty, tty, now=clock)

        def type_(data: bytes):
            os.write(person, data)
            return keyboard.read()

        yield keyboard, type_, lambda: os.read(person, 4096)
        keyboard.close()
        os.close(person)
        os.close(tty)

    def test_a_plain_terminal_a_key_is_held_while_it_repeats(self, terminal, clock):
        keyboard, type_, told = terminal
        assert told().startswith(b"\x1b[?1004h")
        reading = type_(b"w")
        assert reading.pressed == ("w",)
        clock.s += FIRST_S - 0.01
        assert keyboard.read().held == {"w"}  # before repeats begin
        for _ in range(20):
            clock.s += 0.033
            assert type_(b"w").pressed == ()
        clock.s += REPEAT_S - 0.01
        assert keyboard.read().held == {"w"}
        clock.s += 0.02
        assert keyboard.read().held == frozenset()

    def test_special_keys_and_a_lone_escape(self, terminal, clock):
        keyboard, type_, _ = terminal
        assert type_(b"\x1b[A\x1bOB \r+G").pressed == ("up", "down", "space", "enter", "+", "g")
        assert type_(b"\x1b").pressed == ()  # an arrow may be on its way
        clock.s += ESCAPE_S + 0.01
        assert keyboard.read().pressed == ("escape",)
        assert type_(b"\x1b[").pressed == ()
        assert type_(b"C").pressed == ("right",)

    def test_a_kitty_terminal_reports_releases(self, terminal, clock):
        keyboard, type_, told = terminal
        told()
        type_(b"\x1b[?0u\x1b[?62;c")  # it speaks the protocol
        assert keyboard.kitty
        assert told() == b"\x1b[>11u"
        assert type_(b"\x1b[32u").pressed == ("space",)
        assert type_(b"\x1b[119;1:1u").pressed == ("w",)
        clock.s += 60.0
        assert keyboard.read().held == {"space", "w"}
        assert type_(b"\x1b[119;1:2u").pressed == ()
        assert type_(b"\x1b[119;1:3u").held == {"space"}
        assert type_(b"\x1b[1;1:1A").pressed == ("up",)
        assert type_(b"\x1b[1;1:3A\x1b[32;1:3u").held == frozenset()
        with pytest.raises(KeyboardInterrupt):
            type_(b"\x1b[99;5u")

    def test_a_window_out_of_focus_releases_everything(self, terminal):
        _, type_, _ = terminal
        type_(b"\x1b[?0u")
        assert type_(b"\x1b[32u").held == {"space"}
        reading = type_(b"\x1b[O")
        assert not reading.present
        assert "focus" in reading.problem
        assert type_(b"\x1b[I").held == frozenset()

    def test_a_closed_terminal_holds_nothing(self, clock):
        person, tty = os.openpty()
        keyboard = Keyboard(tty, tty, now=clock)
        os.write(person, b" ")
        assert keyboard.read().held == {"space"}
        os.close(person)
        reading = keyboard.read()
        assert not reading.present
        assert reading.held == frozenset()
        keyboard.close()
        os.close(tty)

    def test_the_terminal_is_left_as_it_was(self, clock):
        import termios

        person, tty = os.openpty()
        before = termios.tcgetattr(tty)
        keyboard = Keyboard(tty, tty, now=clock)
        assert termios.tcgetattr(tty) != before
        os.read(person, 4096)
        keyboard.close()
        assert os.read(person, 4096) == b"\x1b[?1004l"
        assert termios.tcgetattr(tty) == before
        os.close(person)
        os.close(tty)

    def test_without_a_terminal_it_says_so(self, pipe):
        path, _ = pipe
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with pytest.raises(OSError, match="needs a terminal"):
            Keyboard(fd, fd)
        os.close(fd)
