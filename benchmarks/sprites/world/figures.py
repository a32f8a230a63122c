"""Characters: proportions, colours and patterns, and the tapered capsules of a body in a pose.

A picture is 128 units high; x points right, y down. A body is assembled around its root (the hips, or the middle of an
animal's back) with x sideways, y down and z towards the viewer. Its yaw rotates x and z, so that a turning body becomes
narrower and shows its side and then its back, where a pack covers the chest. Finally the body is moved so that its
lowest point touches the ground. The depth defines the drawing order of the parts.
"""

from dataclasses import dataclass, field

import numpy as np

from scail2_rt.benchmarks.sprites.world.motions import Motion, Random

# Fields of a part: end points A and B, their radii, then:
AX, AY, BX, BY, RA, RB = range(6)
COLOUR, SECOND = slice(6, 9), slice(9, 12)  # RGB in 0…1, RGB of the stripes
STRIPES, SHADE, LABEL = 12, 13, 14  # stripes along the part (0: none), darkness of the rim, number of the character
FIELDS = 15
RIM = 0.3
COLOURS = {
    "red": (0.82, 0.22, 0.2), "blue": (0.2, 0.36, 0.82), "green": (0.2, 0.62, 0.3), "yellow": (0.9, 0.78, 0.25),
    "black": (0.14, 0.14, 0.17), "white": (0.92, 0.92, 0.9), "orange": (0.92, 0.52, 0.16),
    "purple": (0.5, 0.26, 0.66), "pink": (0.92, 0.56, 0.68), "brown": (0.46, 0.3, 0.18), "cyan": (0.25, 0.7, 0.75),
    "grey": (0.5, 0.5, 0.54),
}  # fmt: skip
SKINS = ((0.95, 0.8, 0.68), (0.86, 0.66, 0.5), (0.62, 0.43, 0.3), (0.4, 0.27, 0.2), (0.62, 0.78, 0.6))
TOP, BOTTOM, SKIN, HAIR, PACK, STRIPE, SHOES, DARK = range(8)  # rows of a palette


@dataclass(frozen=True, slots=True)
class Character:
    """The look of a character.

    height    in units
    sizes     proportions by name, relative to the height
    palette   RGB [8, 3]
    stripes   [3], of trunk, legs and arms
    colours   names of top and bottom colour for the prompt"""

    species: str
    height: float
    sizes: dict[str, float]
    palette: np.ndarray
    stripes: np.ndarray
    colours: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Body:
    """A character in T poses.

    parts     [T, P, FIELDS]
    depth     [T, P], larger is nearer
    joints    [T, J, 2], x and y in units
    bones     [P], number of the part in a stick figure; -1: not part of it
    details   [P], bool: a body rendering omits the part"""

    parts: np.ndarray
    depth: np.ndarray
    joints: np.ndarray
    bones: np.ndarray
    details: np.ndarray


def make_character(species: str, random: Random, height: float | None = None) -> Character:
    """A random character. Proportions vary by ±16 %; colours are drawn from the full palette. height: in units; None:
    random."""
    names = list(COLOURS)
    top, bottom = (str(name) for name in random.choice(names, 2, replace=False))
    hair, pack, stripe, shoes = (COLOURS[name] for name in random.choice(names, 4))
    skin = SKINS[random.integers(len(SKINS))]
    palette = np.array([COLOURS[top], COLOURS[bottom], skin, hair, pack, stripe, shoes, (0.08, 0.08, 0.1)])
    palette = np.clip(palette + random.normal(0, 0.04, palette.shape), 0.04, 0.96)
    stripes = (random.uniform(size=3) < 0.4).astype(float)  # one band per part, because the small VAE blurs finer ones
    if species == "human":
        middle = {"thigh": 0.22, "shin": 0.22, "torso": 0.28, "upper": 0.17, "fore": 0.16, "head": 0.1,
                  "shoulders": 0.11, "hips": 0.06, "girth": 0.105, "limb": 0.062, "pack": 0.085}  # fmt: skip
        usual = random.uniform(82, 102)
    else:
        middle = {"trunk": 0.5, "thigh": 0.21, "shin": 0.2, "neck": 0.22, "head": 0.11, "snout": 0.13, "girth": 0.15,
                  "limb": 0.066, "tail": 0.22, "ear": 0.08}  # fmt: skip
        usual = random.uniform(70, 88)
    sizes = {name: value * float(random.uniform(0.84, 1.16)) for name, value in middle.items()}
    return Character(species, float(height or usual), sizes, palette, stripes, (top, bottom))


def pose_body(character: Character, motion: Motion, x: np.ndarray, ground: np.ndarray, label: int) -> Body:
    """The character in a motion of T frames. x [T]: position of its root; ground [T]: y of its lowest point, except in
    jumps; label: number of the character."""
    assembly = _Assembly(character, motion, label)
    (_person if character.species == "human" else _animal)(assembly)
    return assembly.set_down(x, ground)


@dataclass(frozen=True, slots=True)
class Look:
    """The drawing options of a part.

    colour    row of the palette
    stripes   number of stripes along the part
    layer     added to the depth, independent of the yaw
    bone      the part belongs to the stick figure
    detail    a body rendering omits the part"""

    colour: int
    stripes: float = 0.0
    layer: float = 0.0
    bone: bool = True
    detail: bool = False


@dataclass(slots=True)
class _Assembly:
    """A body being assembled. Lengths are in body heights until `set_down`."""

    character: Character
    motion: Motion
    label: int
    parts: list[np.ndarray] = field(default_factory=list)
    depth: list[np.ndarray] = field(default_factory=list)
    joints: list[np.ndarray] = field(default_factory=list)
    bones: list[int] = field(default_factory=list)
    details: list[bool] = field(default_factory=list)

    def point(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> np.ndarray:
        return np.tile(np.array([x, y, z]), (len(self.motion.yaw), 1))

    def limb(self, start: np.ndarray, angle: np.ndarray, length: float) -> np.ndarray:
        """The end point [T, 3] of a limb. angle [T]: 0 points down, π/2 points to +x."""
        return start + length * np.stack([np.sin(angle), np.cos(angle), np.zeros_like(angle)], 1)

    def turned(self, point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(position [T, 2], depth [T]) of a point [T, 3] after the rotation by the yaw."""
        cos, sin = np.cos(self.motion.yaw), np.sin(self.motion.yaw)
        x, y, z = point.T
        return np.stack([x * cos + z * sin, y], 1), z * cos - x * sin

    def joint(self, point: np.ndarray) -> None:
        self.joints.append(self.turned(point)[0])

    def add(self, a: np.ndarray, b: np.ndarray, ra: float, rb: float, look: Look) -> None:
        """Add a capsule from `a` to `b` with radii `ra` and `rb`."""
        (start, near), (end, far) = self.turned(a), self.turned(b)
        part = np.zeros((len(start), FIELDS))
        part[:, AX : AY + 1], part[:, BX : BY + 1], part[:, RA], part[:, RB] = start, end, ra, rb
        part[:, COLOUR], part[:, SECOND] = self.character.palette[look.colour], self.character.palette[STRIPE]
        part[:, STRIPES], part[:, SHADE], part[:, LABEL] = look.stripes, RIM, self.label
        self.parts.append(part)
        self.depth.append((near + far) / 2 + look.layer)
        self.bones.append(sum(number >= 0 for number in self.bones) if look.bone else -1)
        self.details.append(look.detail)

    def set_down(self, x: np.ndarray, ground: np.ndarray) -> Body:
        h = self.character.height
        parts, joints = np.stack(self.parts, 1), np.stack(self.joints, 1)
        parts[..., AX : RB + 1] *= h
        lowest = np.maximum(parts[..., AY] + parts[..., RA], parts[..., BY] + parts[..., RB]).max(1)
        root = np.stack([x + h * self.motion.sway, ground - lowest - h * self.motion.lift], 1)
        parts[..., AX : AY + 1] += root[:, None]
        parts[..., BX : BY + 1] += root[:, None]
        joints = joints * h + root[:, None]
        return Body(parts, np.stack(self.depth, 1), joints, np.array(self.bones), np.array(self.details))


def _person(body: _Assembly) -> None:
    """Assemble a person: 20 parts; joints: head, hands, elbows, knees, feet."""
    s, angle, stripes = body.character.sizes, body.motion.angles.T, body.character.stripes
    hips, limb, girth = body.point(), s["limb"], s["girth"]
    neck = body.limb(hips, np.pi - angle[0], s["torso"])
    head = body.limb(neck, np.pi - angle[0] - angle[1], s["head"] * 1.15)
    body.joint(head)
    for side, first in ((-1, 2), (1, 6)):
        shoulder, elbow, hip, knee = angle[first : first + 4] * side
        top, socket = neck + body.point(side * s["shoulders"], 0.035), hips + body.point(side * s["hips"])
        middle = body.limb(top, shoulder, s["upper"])
        hand = body.limb(middle, shoulder + elbow, s["fore"])
        bend = body.limb(socket, hip, s["thigh"])
        foot = body.limb(bend, hip + knee, s["shin"])
        body.add(socket, bend, limb * 1.15, limb * 0.95, Look(BOTTOM, stripes=stripes[1], layer=-0.02))
        body.add(bend, foot, limb * 0.95, limb * 0.8, Look(BOTTOM, stripes=stripes[1], layer=-0.019))
        body.add(foot, foot + body.point(side * 0.03, 0.0, 0.03), limb * 0.9, limb * 0.75, Look(SHOES, bone=False))
        body.add(top, middle, limb, limb * 0.85, Look(TOP, stripes=stripes[2], layer=0.08))
        body.add(middle, hand, limb * 0.85, limb * 0.7, Look(TOP, stripes=stripes[2], layer=0.09))
        body.add(hand, hand, limb * 0.85, limb * 0.85, Look(SKIN, layer=0.095, bone=False))
        for point in (hand, middle, bend, foot):
            body.joint(point)
    body.add(hips, neck, girth * 0.9, girth, Look(TOP, stripes=stripes[0], layer=0.03))
    body.add(head, head, s["head"], s["head"], Look(SKIN, layer=0.05))
    up = body.limb(head, np.pi - angle[0] - angle[1], s["head"] * 0.55)
    body.add(up, up + body.point(0, 0, -0.06), s["head"] * 0.75, s["head"] * 0.8, Look(HAIR, layer=0.1, bone=False))
    back = hips + 0.62 * (neck - hips) + body.point(0, 0, -0.12)
    body.add(back, back + body.point(0, -0.04), s["pack"], s["pack"] * 0.9, Look(PACK, bone=False))
    for side in (-1, 1):
        eye = head + body.point(side * s["head"] * 0.42, -0.005, s["head"] * 0.9)
        body.add(eye, eye, 0.016, 0.016, Look(DARK, bone=False, detail=True))


def _animal(body: _Assembly) -> None:
    """Assemble an animal: 17 parts; joints: head, tail, knees, feet. At yaw 0 it is seen from the side, head right."""
    s, angle, stripes = body.character.sizes, body.motion.angles.T, body.character.stripes
    half, limb, girth = s["trunk"] / 2, s["limb"], s["girth"]
    chest = body.limb(body.point(), np.pi / 2 - angle[0], half)
    rump = body.limb(body.point(), -np.pi / 2 - angle[0], half)
    head = body.limb(chest, 2.35 - angle[1] - angle[0], s["neck"])
    snout = body.limb(head, np.pi / 2 - 0.15 - angle[1], s["snout"])
    tail = body.limb(rump, -np.pi / 2 - 0.5 - angle[2], s["tail"])
    tip = body.limb(tail, -np.pi / 2 - 0.5 - 1.5 * angle[2], s["tail"] * 0.7)
    body.joint(head)
    body.joint(tip)
    for first, start, z in ((3, chest, 0.06), (5, chest, -0.06), (7, rump, 0.06), (9, rump, -0.06)):
        front = 1 if start is chest else -1
        hip = start + body.point(-0.03 * front, girth * 0.35, z)
        knee = body.limb(hip, angle[first], s["thigh"])
        foot = body.limb(knee, angle[first] - angle[first + 1], s["shin"])
        body.add(hip, knee, limb * 1.2, limb * 0.9, Look(TOP, stripes=stripes[1]))
        body.add(knee, foot, limb * 0.9, limb * 0.8, Look(BOTTOM))
        body.joint(knee)
        body.joint(foot)
    body.add(rump, chest, girth * 0.95, girth, Look(TOP, stripes=stripes[0]))
    body.add(chest, head, girth * 0.7, s["head"] * 0.7, Look(TOP, stripes=stripes[2], layer=0.01))
    body.add(rump, tail, limb * 0.7, limb * 0.6, Look(HAIR, layer=0.01))
    body.add(tail, tip, limb * 0.6, limb * 0.55, Look(HAIR, layer=0.01))
    body.add(head, head, s["head"], s["head"], Look(TOP, layer=0.02, bone=False))
    body.add(head, snout, s["head"] * 0.7, s["head"] * 0.5, Look(SKIN, layer=0.03))
    for z in (0.06, -0.06):
        ear = head + body.point(-0.02, -s["head"] * 0.7, z)
        body.add(ear, ear + body.point(-0.03, -s["ear"]), 0.04, 0.025, Look(HAIR, layer=0.025, bone=False, detail=True))
    eye = head + body.point(0.05, -0.03, 0.09)
    body.add(eye, eye, 0.017, 0.017, Look(DARK, layer=0.03, bone=False, detail=True))
