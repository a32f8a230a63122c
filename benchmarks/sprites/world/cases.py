"""Cases: the inputs of the model and the correct output, for every task, determined by (split, task, seed).

`make_scene` draws all random values with a NumPy generator and describes the case by parts and backgrounds;
`render_case` draws it. The training set uses the same scenes and draws them on a GPU. A driving figure and the
character that it animates share joint angles, position and ground, but not size or proportions: in the correct output,
the character looks as in its reference image.

    animate    driven by another person          mesh       driven by a shaded body rendering
    pose       driven by a stick figure          animal     driven by another animal
    replace    the character replaces the driving figure in the driving scene
    two, three several characters, each assigned to its driving figure by its mask colour
    extra      an additional reference image shows the background behind the character, or the character's back
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from scail2_rt.benchmarks.sprites.world.figures import (
    AX,
    AY,
    BX,
    BY,
    RA,
    RB,
    Body,
    Character,
    make_character,
    pose_body,
)
from scail2_rt.benchmarks.sprites.world.motions import HELD_OUT, PRACTISED, TRAINED, Motion, Random, make_motion, rest
from scail2_rt.benchmarks.sprites.world.raster import (
    BACKGROUND,
    BLOBS,
    FIRST_BLOB,
    HORIZON,
    PAN,
    UNITS,
    Picture,
    black,
    clay,
    draw_picture,
    make_picture,
    skeleton,
)
from scail2_rt.runtime.masks.palette import CHARACTERS, PALETTE, RGB

TASKS = ("animate", "pose", "mesh", "animal", "replace", "two", "three", "extra")
SPLITS = ("train", "test")  # they differ in seeds; "test" also has motions that "train" does not have
SIZE = (128, 128)
FRAMES = 33
BLACK, WHITE = PALETTE["black"], PALETTE["white"]
_VERBS = {
    "walk": "walks", "dance": "dances", "wave": "waves", "jump": "jumps", "turn": "turns", "march": "walks fast",
    "stretch": "stretches", "wag": "wags", "trot": "runs", "spin": "turns round",
}  # fmt: skip
# Verbs for the motion "exercise", chosen at random, so that the model does not depend on the verb.
_MOVES = ("moves", "moves fast", "plays", "works", "climbs", "skips", "boxes", "kicks", "swims", "bends", "exercises")
Colours = tuple[RGB, ...]  # colours of a mask by label: background, then characters


@dataclass(frozen=True, slots=True)
class View:
    """A picture, and the colours of its mask by label."""

    picture: Picture
    colours: Colours


@dataclass(frozen=True, slots=True)
class Scene:
    """The description of a case before drawing.

    reference, extras   reference image, additional reference images
    truth               the correct output
    joints              [T, characters · J, 2] in the correct output, x and y in units
    facing_away         bool [T, characters]: the character's back is visible
    hides               content that only an additional reference shows: "background", "back", or empty for none"""

    task: str
    seed: int
    mode: str
    prompt: str
    reference: View
    extras: tuple[View, ...]
    driving: View
    truth: Picture
    joints: np.ndarray
    facing_away: np.ndarray
    hides: str = ""


@dataclass(frozen=True, slots=True)
class SpriteCase:
    """A drawn case. Images are uint8 [H, W, 3], videos uint8 [T, H, W, 3].

    extras   pairs (image, mask)
    truth    the correct output
    labels   uint8 [T, H, W], number of the character that `truth` shows, 0 for none
    hidden   bool [T, H, W], pixels whose content the first reference does not show"""

    scene: Scene
    reference: np.ndarray
    reference_mask: np.ndarray
    extras: tuple[tuple[np.ndarray, np.ndarray], ...]
    driving: np.ndarray
    driving_mask: np.ndarray
    truth: np.ndarray
    labels: np.ndarray
    hidden: np.ndarray


def make_scene(task: str, seed: int, split: str = "test", frames: int = FRAMES, swapped: bool = False) -> Scene:
    """The scene number `seed` of a task. swapped: with several characters, assign them to the driving figures in
    reverse order; everything else is unchanged."""
    random = np.random.default_rng([SPLITS.index(split), TASKS.index(task), seed])
    return _SCENES[task](_Draw(task, seed, split, frames, random, swapped))


def closeup(scene: Scene) -> Scene:
    """The same case with a reference image that the character fills, so that it does not show the character's size."""
    picture = scene.reference.picture
    parts = picture.parts.copy()
    x, y, radii = parts[..., [AX, BX]], parts[..., [AY, BY]], parts[..., [RA, RB]]
    (left, right), (top, bottom) = (((at - radii).min(), (at + radii).max()) for at in (x, y))
    grow = (UNITS - 4) / max(right - left, bottom - top)
    parts[..., [AX, BX]] = (x - (left + right) / 2) * grow + UNITS / 2
    parts[..., [AY, BY]] = (y - (top + bottom) / 2) * grow + UNITS / 2
    parts[..., [RA, RB]] = radii * grow
    return replace(scene, task="closeup", reference=replace(scene.reference, picture=replace(picture, parts=parts)))


def render_case(scene: Scene, size: tuple[int, int] = SIZE) -> SpriteCase:
    """Draw a scene. size: (H, W) in pixels."""
    reference, reference_labels, reference_mask = draw_view(scene.reference, size)
    extras = tuple((image[0], mask[0]) for image, _, mask in (draw_view(view, size) for view in scene.extras))
    driving, _, driving_mask = draw_view(scene.driving, size)
    truth, labels = draw_picture(scene.truth, *size)
    hidden = np.zeros(labels.shape, bool)
    if scene.hides == "background":
        hidden = (labels < 1) & (reference_labels > 0)
    elif scene.hides == "back":
        hidden = (labels > 0) & np.expand_dims(scene.facing_away.any(1), (1, 2))
    return SpriteCase(scene, reference[0], reference_mask[0], extras, driving, driving_mask, truth, labels, hidden)


def draw_view(view: View, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a view → image uint8 [T, H, W, 3], labels uint8 [T, H, W], mask uint8 [T, H, W, 3]."""
    image, labels = draw_picture(view.picture, *size)
    return image, labels, np.array(view.colours, np.uint8)[labels]


@dataclass(slots=True)
class _Draw:
    """The parameters of a scene and random choices that all tasks share."""

    task: str
    seed: int
    split: str
    frames: int
    random: Random
    swapped: bool = False

    def motion(self, species: str, names: tuple[str, ...] = ()) -> Motion:
        """A random motion; in the test split every other case has one that is never trained on."""
        usual = PRACTISED if self.split == "train" else (HELD_OUT, TRAINED)[self.seed % 2]
        names = names or usual[species]
        return make_motion(species, str(self.random.choice(names)), self.frames, self.random)

    def scenery(self, pan: float = 0.0) -> np.ndarray:
        """A random background [T, BACKGROUND]. pan: its horizontal movement over the clip, in units."""
        random, one = self.random, np.zeros(BACKGROUND)
        one[:9] = random.uniform(0.15, 0.9, 9)
        one[3:6] = np.clip(one[:3] + random.uniform(-0.2, 0.35, 3), 0.05, 1)
        one[HORIZON] = random.uniform(70, 100)
        for i in range(BLOBS):
            start = FIRST_BLOB + 6 * i
            one[start : start + 2] = random.uniform((-10, 8), (138, 85))
            one[start + 2] = random.uniform(7, 24)
            one[start + 3 : start + 6] = random.uniform(0.1, 0.95, 3)
        every = np.tile(one, (self.frames, 1))
        every[:, PAN] = pan * np.linspace(-0.5, 0.5, self.frames)
        return every

    def place(self, x: float = 64, spread: float = 14) -> tuple[np.ndarray, np.ndarray]:
        """A random position of a figure: (x [T], ground [T]), in units."""
        random = self.random
        return np.full(self.frames, x + random.uniform(-spread, spread)), np.full(self.frames, random.uniform(108, 122))

    def at_ease(self, character: Character, label: int, x: float = 64, spread: float = 14, yaw: float = 0.0) -> Body:
        """A character in a rest pose, for a reference image."""
        place, ground = self.place(x, spread)
        return pose_body(character, rest(character.species, self.random, yaw), place[:1], ground[:1], label)

    def colours(self, count: int, background: RGB) -> Colours:
        return (background, *(PALETTE[CHARACTERS[i]] for i in self.random.permutation(len(CHARACTERS))[:count]))

    def describe(self, character: Character, motion: Motion) -> str:
        """The part of the prompt that describes a character and its motion."""
        top, bottom = character.colours
        article = "an" if top.startswith("o") else "a"
        verb = str(self.random.choice(_MOVES)) if motion.name == "exercise" else _VERBS[motion.name]
        if character.species == "animal":
            return f"{article} {top} dog with {bottom} legs {verb}"
        return f"a man in {article} {top} shirt and {bottom} trousers {verb}"

    def finish(
        self, mode: str, prompt: str, reference: View, driving: View, truth: Picture, acts: list[tuple[Body, Motion]]
    ) -> Scene:
        """The scene from its parts. acts: per character of the correct output, its body and its motion."""
        away = np.stack([np.cos(motion.yaw) < -0.3 for _, motion in acts], 1)
        joints = np.concatenate([body.joints for body, _ in acts], 1)
        return Scene(self.task, self.seed, mode, prompt, reference, (), driving, truth, joints, away)


def _recoloured(colours: Colours, background: RGB) -> Colours:
    """The same colours with another background."""
    return (background, *colours[1:])


def _single(draw: _Draw, species: str, style: Callable[[Body], Body] | None = None) -> Scene:
    """One character, animated in front of the background of its reference. style: of the driving figure."""
    character, driver = (make_character(species, draw.random) for _ in range(2))
    motion, (x, ground), scenery = draw.motion(species), draw.place(), draw.scenery()
    colours = draw.colours(1, WHITE)
    reference = View(make_picture([draw.at_ease(character, 1)], scenery[:1]), colours)
    figure, body = (pose_body(who, motion, x, ground, 1) for who in (driver, character))
    backdrop = draw.scenery() if style is None else black(draw.frames)
    driving = View(make_picture([style(figure) if style else figure], backdrop), _recoloured(colours, BLACK))
    truth = make_picture([body], scenery)
    return draw.finish("animate", draw.describe(character, motion), reference, driving, truth, [(body, motion)])


def _replace(draw: _Draw) -> Scene:
    species = "human" if draw.random.uniform() < 0.75 else "animal"
    driver = make_character(species, draw.random)
    character = make_character(species, draw.random, driver.height * draw.random.uniform(0.85, 1.18))
    motion, (x, ground) = draw.motion(species), draw.place()
    scenery = draw.scenery(draw.random.uniform(-20, 20))
    colours = draw.colours(1, BLACK)
    reference = View(make_picture([draw.at_ease(character, 1)], draw.scenery()[:1]), colours)
    figure, body = (pose_body(who, motion, x, ground, 1) for who in (driver, character))
    driving = View(make_picture([figure], scenery), _recoloured(colours, WHITE))
    truth = make_picture([body], scenery)
    return draw.finish("replace", draw.describe(character, motion), reference, driving, truth, [(body, motion)])


def _several(draw: _Draw, count: int) -> Scene:
    """Characters side by side; their order in the driving clip is independent of that in the reference image."""
    random, low, high = draw.random, *{2: (58, 68), 3: (46, 54)}[count]
    middles = (np.arange(count) + 0.5) * 128 / count
    characters, drivers = (
        [make_character("human", random, random.uniform(low, high)) for _ in range(count)] for _ in range(2)
    )
    standing, acting = random.permutation(middles), random.permutation(middles)
    motions = [draw.motion("human") for _ in range(count)]
    places = [draw.place(middle, 12 / count) for middle in acting]
    if draw.swapped:
        drivers, motions, places = drivers[::-1], motions[::-1], places[::-1]
    scenery, colours = draw.scenery(), draw.colours(count, WHITE)
    rests = [draw.at_ease(who, i + 1, standing[i], 12 / count) for i, who in enumerate(characters)]
    figures, bodies = (
        [pose_body(who, motions[i], *places[i], i + 1) for i, who in enumerate(people)]
        for people in (drivers, characters)
    )
    reference = View(make_picture(rests, scenery[:1]), colours)
    drawn = figures[::-1] if draw.swapped else figures  # keep the drawing order of the case that is not swapped
    driving = View(make_picture(drawn, draw.scenery()), _recoloured(colours, BLACK))
    prompt = " and ".join(draw.describe(*pair) for pair in zip(characters, motions, strict=True))
    acts = list(zip(bodies, motions, strict=True))
    return draw.finish("animate", prompt, reference, driving, make_picture(bodies, scenery), acts)


def _extra(draw: _Draw) -> Scene:
    """A case with an additional reference that shows the background behind the character, or its back."""
    hides = ("background", "back")[draw.seed // 2 % 2]
    character, driver = (make_character("human", draw.random) for _ in range(2))
    motion = draw.motion("human", ("spin",) if hides == "back" else ())
    (x, ground), scenery, colours = draw.place(), draw.scenery(), draw.colours(1, WHITE)
    resting = draw.at_ease(character, 1)
    if hides == "background":
        centre = resting.joints[0].mean(0)
        scenery[:, FIRST_BLOB : FIRST_BLOB + 3] = [centre[0], min(centre[1], 80), draw.random.uniform(14, 22)]
        x = x + np.where(x > centre[0], 14, -14)  # so that the background behind the character becomes visible
        extra = View(make_picture([], scenery[:1]), (WHITE, *colours[1:]))
    else:
        turned = draw.at_ease(character, 1, yaw=np.pi)
        extra = View(make_picture([turned], draw.scenery()[:1]), (BLACK, *colours[1:]))
    figure, body = (pose_body(who, motion, x, ground, 1) for who in (driver, character))
    driving = View(make_picture([figure], draw.scenery()), _recoloured(colours, BLACK))
    reference, truth = View(make_picture([resting], scenery[:1]), colours), make_picture([body], scenery)
    scene = draw.finish("animate", draw.describe(character, motion), reference, driving, truth, [(body, motion)])
    return replace(scene, extras=(extra,), hides=hides)


_SCENES: dict[str, Callable[[_Draw], Scene]] = {
    "animate": lambda draw: _single(draw, "human"),
    "pose": lambda draw: _single(draw, "human", skeleton),
    "mesh": lambda draw: _single(draw, "human", clay),
    "animal": lambda draw: _single(draw, "animal"),
    "replace": _replace,
    "two": lambda draw: _several(draw, 2),
    "three": lambda draw: _several(draw, 3),
    "extra": _extra,
}
