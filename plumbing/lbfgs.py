"""plumbing/lbfgs.py: the minimiser behind scikit-learn's logistic regression, step for step.

scikit-learn stops long before the optimum, so that only the same path ends at the same weights. The path is
that of L-BFGS-B (Byrd, Lu, Nocedal, Zhu 1995) as scipy runs it where no variable has a bound: directions
from the last ten steps, the line search of More and Thuente (1994), and scipy's two rules to stop.
"""
import math
from dataclasses import dataclass

import numpy as np

MEMORY = 10                           # pairs (step, change of the gradient) that make a direction
EPSILON = float(np.finfo(float).eps)
ENOUGH_DECREASE, FLAT_ENOUGH, NARROW = 1e-3, 0.9, 0.1        # of the line search: scipy's ftol, gtol, xtol
LONGEST = 1e10                        # step


def minimize(loss, start: np.ndarray, steps=100, gradient_below=1e-4, decrease_below=64 * EPSILON, tries=50):
    """loss(x) -> (value, gradient [n]), float64; start: x [n] -> the x at which scipy would stop.

    That is after so many steps, or where no part of the gradient is above `gradient_below`, or where a step
    has lowered the value by less than `decrease_below` of it. tries: values that a line search may ask for.

    >>> minimize(lambda x: (float((x - 3) @ (x - 3)), 2 * (x - 3)), np.zeros(2)).round(6).tolist()
    [3.0, 3.0]
    """
    x = start
    value, gradient = loss(x)
    pairs = []                                                       # [(step, change of the gradient)]
    done = 0
    while done < steps and np.abs(gradient).max() > gradient_below:
        direction = -inverse_hessian_times(gradient, pairs)
        first = min(1 / np.linalg.norm(direction), LONGEST) if done == 0 else 1.0
        found = search_line(loss, x, value, gradient, direction, first, tries)
        if found is None:
            if not pairs:
                break
            pairs = []                                           # they mislead: once more, straight downhill
            continue
        length, new_x, new_value, new_gradient = found
        done += 1
        decrease = value - new_value
        step, change = length * direction, new_gradient - gradient
        slope = length * float(gradient @ direction)
        small = decrease <= decrease_below * max(abs(value), abs(new_value), 1)
        x, value, gradient = new_x, new_value, new_gradient
        if small:
            break
        if step @ change > EPSILON * -slope:                         # else the curvature is not positive
            pairs = [*pairs, (step, change)][-MEMORY:]
    return x


def inverse_hessian_times(gradient: np.ndarray, pairs: list) -> np.ndarray:
    """The two loops of L-BFGS (Nocedal 1980)."""
    product = gradient.copy()
    shares = []
    for step, change in reversed(pairs):
        share = (step @ product) / (step @ change)
        product -= share * change
        shares.append(share)
    if pairs:
        step, change = pairs[-1]
        product *= (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares)):
        product += step * (share - (change @ product) / (step @ change))
    return product


# --------------------------------------------------------------------------------------------- line search

@dataclass
class Point:
    """A step length with the value and the slope there."""
    length: float
    value: float
    slope: float


def search_line(loss, x, value, gradient, direction, first: float, tries: int):
    """(length, x, value, gradient) of a step that lowers the value enough and flattens the slope; None: no
    luck.

    A point that is the best within rounding errors will do.
    """
    origin = Point(0.0, value, float(gradient @ direction))
    if origin.slope >= 0:
        return None
    search = MoreThuente(origin, first)
    for _ in range(tries):
        new_x = x + search.length * direction
        new_value, new_gradient = loss(new_x)
        if search.ends_at(Point(search.length, new_value, float(new_gradient @ direction))):
            return search.length, new_x, new_value, new_gradient
    return None


class MoreThuente:
    """More and Thuente's search: `length` is the next step to try, `ends_at` tells how that was.

    best, other: the ends of the interval that holds an acceptable step, once it is bracketed.
    """

    def __init__(self, origin: Point, first: float):
        self.origin, self.best, self.other = origin, origin, origin
        self.length = first
        self.bracketed, self.first_stage = False, True
        self.width, self.width_before = LONGEST, 2 * LONGEST
        self.lowest, self.highest = 0.0, 5 * first               # bounds of the next step
        self.demanded = ENOUGH_DECREASE * origin.slope           # decrease a unit of length

    def ends_at(self, point: Point) -> bool:
        line = self.origin.value + point.length * self.demanded  # what the value has to lie below
        low_enough = point.value <= line
        if low_enough and point.slope >= 0:
            self.first_stage = False
        if low_enough and abs(point.slope) <= FLAT_ENOUGH * -self.origin.slope:
            return True
        if self.is_stuck(point.length):
            return True
        if point.length == LONGEST and low_enough and point.slope <= self.demanded:
            return True
        if point.length == 0 and (not low_enough or point.slope >= self.demanded):
            return True
        self.narrow(point, line)
        return False

    def is_stuck(self, length: float) -> bool:
        if not self.bracketed:
            return False
        outside = length <= self.lowest or length >= self.highest
        return outside or self.highest - self.lowest <= NARROW * self.highest

    def narrow(self, point: Point, line: float) -> None:
        """Take the point into the interval and choose the next length."""
        if self.first_stage and point.value <= self.best.value and point.value > line:
            def tilt(p, sign):                                   # the values above the line, and back
                value = p.value + sign * p.length * self.demanded
                return Point(p.length, value, p.slope + sign * self.demanded)

            ends = tilt(self.best, -1), tilt(self.other, -1), tilt(point, -1)
            best, other = self.step(*ends)
            self.best, self.other = tilt(best, 1), tilt(other, 1)
        else:
            self.best, self.other = self.step(self.best, self.other, point)
        best, other = self.best.length, self.other.length
        if self.bracketed:
            if abs(other - best) >= 0.66 * self.width_before:
                self.length = best + 0.5 * (other - best)
            self.width_before, self.width = self.width, abs(other - best)
            self.lowest, self.highest = min(best, other), max(best, other)
        else:
            self.lowest = self.length + 1.1 * (self.length - best)
            self.highest = self.length + 4 * (self.length - best)
        self.length = min(max(self.length, 0.0), LONGEST)
        if self.is_stuck(self.length):
            self.length = best

    def step(self, best: Point, other: Point, point: Point) -> tuple[Point, Point]:
        """Set the next length from cubics and secants -> the new ends of the interval."""
        turned = point.slope * math.copysign(1, best.slope) < 0
        span = point.length - best.length
        if point.value > best.value:                             # higher: the minimum lies between
            gap = cubic_share(best, point, best.slope, span < 0)
            cubic = best.length + gap * span
            bend = (best.value - point.value) / span + best.slope
            secant = best.length + best.slope / bend / 2 * span
            near = abs(cubic - best.length) < abs(secant - best.length)
            self.length = cubic if near else cubic + (secant - cubic) / 2
            self.bracketed = True
            return best, point
        if turned:                                               # lower, and the slope has changed its sign
            cubic = point.length + cubic_share(point, best, point.slope, span > 0) * -span
            secant = point.length + point.slope / (point.slope - best.slope) * -span
            far = abs(cubic - point.length) > abs(secant - point.length)
            self.length = cubic if far else secant
            self.bracketed = True
            return point, best
        if abs(point.slope) < abs(best.slope):                   # lower and flatter
            self.length = self.flatter(best, other, point)
        elif self.bracketed:                                     # lower, and no flatter
            reach = point.length - other.length
            share = cubic_share(point, other, point.slope, reach > 0)
            self.length = point.length + share * -reach
        else:
            self.length = self.highest if span > 0 else self.lowest
        return point, other

    def flatter(self, best: Point, other: Point, point: Point) -> float:
        """The next length where the new point is lower and flatter than the best one."""
        span = point.length - best.length
        theta = 3 * (best.value - point.value) / span + best.slope + point.slope
        size = max(abs(theta), abs(best.slope), abs(point.slope))
        inside = (theta / size) ** 2 - best.slope / size * (point.slope / size)
        gamma = size * math.sqrt(max(0, inside))
        if span > 0:
            gamma = -gamma
        share = (gamma - point.slope + theta) / (gamma + (best.slope - point.slope) + gamma)
        if share < 0 and gamma != 0:
            cubic = point.length + share * -span
        else:
            cubic = self.highest if span > 0 else self.lowest
        secant = point.length + point.slope / (point.slope - best.slope) * -span
        cubic_is_near = abs(cubic - point.length) < abs(secant - point.length)
        if self.bracketed:
            length = cubic if cubic_is_near else secant
            limit = point.length + 0.66 * (other.length - point.length)
            return min(limit, length) if span > 0 else max(limit, length)
        length = secant if cubic_is_near else cubic
        return max(self.lowest, min(self.highest, length))


def cubic_share(a: Point, b: Point, slope: float, negative: bool) -> float:
    """Where, between a (0) and b (1), the cubic through both has its minimum. slope: a's."""
    theta = 3 * (a.value - b.value) / (b.length - a.length) + a.slope + b.slope
    size = max(abs(theta), abs(a.slope), abs(b.slope))
    gamma = size * math.sqrt((theta / size) ** 2 - a.slope / size * (b.slope / size))
    if negative:
        gamma = -gamma
    return (gamma - slope + theta) / (gamma - slope + gamma + b.slope)
