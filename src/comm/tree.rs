//! Sums in one fixed binary tree over the lanes of the global batch.
//!
//! Floating-point addition is not associative, so the order decides the bits. Here it is: level by level, each pair
//! of neighbours becomes one (left + right), an odd one at the end is carried up unchanged:
//! `((0+1)+(2+3))+4` for five leaves.

use std::ops::Range;

/// What a [`TreeSum`] adds up: a vector of f32, wherever it lies.
pub trait Leaf {
    fn length(&self) -> usize;
    /// Makes all elements 0.
    fn clear(&mut self);
    /// Adds the elements `range` of `right` to those of self, element by element.
    fn add_right(&mut self, right: &Self, range: Range<usize>);
}

impl Leaf for Vec<f32> {
    fn length(&self) -> usize {
        self.len()
    }

    fn clear(&mut self) {
        self.fill(0.0);
    }

    fn add_right(&mut self, right: &Self, range: Range<usize>) {
        add_right(&mut self[range.clone()], &right[range]);
    }
}

/// Adds `right` to `left` element-wise: the one node operation of every tree, between lanes and between ranks.
pub(super) fn add_right(left: &mut [f32], right: &[f32]) {
    assert_eq!(left.len(), right.len(), "leaves of a tree sum have different lengths");
    for (l, r) in left.iter_mut().zip(right) {
        *l += *r;
    }
}

/// The tree sum of `leaves` (all of one length), level by level; empty without leaves. The definition that
/// [`TreeSum`] and [`super::Communicator::all_reduce_sum_f32`] reproduce bit for bit.
pub fn tree_sum(leaves: &[Vec<f32>]) -> Vec<f32> {
    let mut level = leaves.to_vec();
    while level.len() > 1 {
        let mut next = Vec::with_capacity(level.len().div_ceil(2));
        let mut nodes = level.into_iter();
        while let Some(mut left) = nodes.next() {
            if let Some(right) = nodes.next() {
                add_right(&mut left, &right);
            }
            next.push(left);
        }
        level = next;
    }
    level.pop().unwrap_or_default()
}

/// Whether `lanes` spread evenly over `ranks` are summed in the same tree as on one rank: lanes per rank must be a
/// power of two, so that each rank holds a whole subtree. Otherwise the sums are right, but other bits.
pub fn same_tree(lanes: usize, ranks: usize) -> bool {
    ranks == 1 || (ranks > 0 && lanes % ranks == 0 && (lanes / ranks).is_power_of_two())
}

/// [`tree_sum`] of lanes that come one at a time, with at most log2(lanes) + 1 live buffers: a binary counter whose
/// digit k is the sum of 2^k lanes.
///
/// ```
/// # use rldiff::comm::TreeSum;
/// let mut sum = TreeSum::new(3);
/// for lane in 0..4 {
///     let mut gradient = sum.buffer(); // zeros, recycled
///     gradient.fill(lane as f32);
///     sum.push(gradient);
/// }
/// assert_eq!(sum.finish(), [6.0; 3]);
/// ```
pub struct TreeSum<L: Leaf = Vec<f32>> {
    length: usize,
    make: Box<dyn Fn() -> L + Send>,
    /// (level, sum of 2^level lanes), levels strictly falling.
    digits: Vec<(u32, L)>,
    spare: Vec<L>,
}

impl TreeSum {
    /// For lanes of `length` elements.
    pub fn new(length: usize) -> Self {
        TreeSum::of(move || vec![0.0; length])
    }
}

impl<L: Leaf> TreeSum<L> {
    /// For lanes like those that `make` makes, filled with zeros.
    pub fn of(make: impl Fn() -> L + Send + 'static) -> Self {
        let first = make();
        TreeSum { length: first.length(), make: Box::new(make), digits: Vec::new(), spare: vec![first] }
    }

    /// A buffer of zeros for the next lane; one that an earlier addition set free where there is one.
    pub fn buffer(&mut self) -> L {
        match self.spare.pop() {
            Some(mut buffer) => {
                buffer.clear();
                buffer
            }
            None => (self.make)(),
        }
    }

    /// Adds the next lane. Panics if its length is not that of the sum.
    pub fn push(&mut self, lane: L) {
        assert_eq!(lane.length(), self.length, "a lane's length differs from the sum's");
        let (mut level, mut node) = (0, lane);
        while let Some((_, mut left)) = self.digits.pop_if(|(top, _)| *top == level) {
            left.add_right(&node, 0..self.length);
            self.spare.push(std::mem::replace(&mut node, left));
            level += 1;
        }
        self.digits.push((level, node));
    }

    /// The sum of the lanes so far (zeros without any); the next lane begins a new sum. Hand the result back with
    /// [`TreeSum::recycle`] to save an allocation.
    pub fn finish(&mut self) -> L {
        let Some((_, mut node)) = self.digits.pop() else { return self.buffer() };
        // the incomplete right edge of the tree: what is carried up meets ever larger left neighbours
        while let Some((_, mut left)) = self.digits.pop() {
            left.add_right(&node, 0..self.length);
            self.spare.push(std::mem::replace(&mut node, left));
        }
        node
    }

    /// The elements `range` of the sum of all lanes so far and `last`, the last one, before the rest of `last` is
    /// known. Call it once for every element of a sum, then [`TreeSum::finish_in_parts`].
    pub fn add_last(&mut self, last: &L, range: Range<usize>) {
        // pushing the last lane and carrying up the right edge meet the digits in the same order: last to first
        let mut digits = self.digits.iter_mut().rev().map(|(_, digit)| digit);
        let Some(mut node) = digits.next() else { return };
        node.add_right(last, range.clone());
        for left in digits {
            left.add_right(node, range.clone());
            node = left;
        }
    }

    /// Where the sum that [`TreeSum::add_last`] makes lies: `last` itself where there was no lane before it.
    pub fn root<'a>(&'a self, last: &'a L) -> &'a L {
        self.digits.first().map_or(last, |(_, digit)| digit)
    }

    /// The sum after [`TreeSum::add_last`] has seen every element; the next lane begins a new sum.
    pub fn finish_in_parts(&mut self, last: L) -> L {
        let mut nodes = self.digits.drain(..).map(|(_, digit)| digit).chain([last]);
        let root = nodes.next().expect("there is the last lane");
        self.spare.extend(nodes);
        root
    }

    /// Forgets the lanes so far.
    pub fn reset(&mut self) {
        self.spare.extend(self.digits.drain(..).map(|(_, digit)| digit));
    }

    /// Gives back a buffer that is no longer needed.
    pub fn recycle(&mut self, buffer: L) {
        if buffer.length() == self.length {
            self.spare.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of very different size, so that the order of additions shows.
    fn leaf(index: usize, length: usize) -> Vec<f32> {
        (0..length).map(|i| ((i * 31 + index * 17) as f32).sin() * 10f32.powi(((i + index) % 9) as i32 - 4)).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    #[test]
    fn five_leaves_by_hand() {
        let leaves: Vec<Vec<f32>> = [0.1f32, 1e8, -1e8, 0.7, 3.3].iter().map(|&v| vec![v]).collect();
        let by_hand = ((0.1f32 + 1e8) + (-1e8f32 + 0.7)) + 3.3;
        assert_eq!(tree_sum(&leaves)[0].to_bits(), by_hand.to_bits());
        assert!(tree_sum(&[]).is_empty());
    }

    #[test]
    fn one_at_a_time_equals_level_by_level() {
        let mut sum = TreeSum::new(50);
        for count in 0..40 {
            let leaves: Vec<Vec<f32>> = (0..count).map(|l| leaf(l, 50)).collect();
            for l in &leaves {
                let mut lane = sum.buffer();
                assert!(lane.iter().all(|&v| v == 0.0), "a recycled buffer is not zero");
                lane.copy_from_slice(l);
                sum.push(lane);
            }
            let buffers = sum.digits.len() + sum.spare.len();
            assert!(buffers <= 8, "{buffers} buffers for {count} lanes");
            let total = sum.finish();
            let expected = if count == 0 { vec![0.0; 50] } else { tree_sum(&leaves) };
            assert_eq!(bits(&total), bits(&expected), "{count} lanes");
            sum.recycle(total);
        }
    }

    #[test]
    fn a_last_lane_in_parts_gives_the_same_bits() {
        let mut sum = TreeSum::new(50);
        for count in 1..40 {
            let leaves: Vec<Vec<f32>> = (0..count).map(|l| leaf(l, 50)).collect();
            leaves[..count - 1].iter().for_each(|lane| sum.push(lane.clone()));
            let last = leaves[count - 1].clone();
            for range in [37..50, 0..11, 11..37] {
                sum.add_last(&last, range.clone());
                assert_eq!(bits(&sum.root(&last)[range.clone()]), bits(&tree_sum(&leaves)[range]), "{count} lanes");
            }
            let total = sum.finish_in_parts(last);
            assert_eq!(bits(&total), bits(&tree_sum(&leaves)), "{count} lanes");
            sum.recycle(total);
        }
    }

    #[test]
    fn the_order_matters_in_this_test() {
        let leaves: Vec<Vec<f32>> = (0..8).map(|l| leaf(l, 50)).collect();
        let mut in_order = leaves[0].clone();
        leaves[1..].iter().for_each(|l| add_right(&mut in_order, l));
        assert_ne!(bits(&tree_sum(&leaves)), bits(&in_order));
    }

    #[test]
    fn ranks_continue_the_tree_of_lanes_exactly_where_promised() {
        for (lanes, ranks) in [(8, 2), (8, 4), (8, 8), (12, 3), (24, 6), (6, 1), (16, 1)] {
            assert!(same_tree(lanes, ranks));
            let leaves: Vec<Vec<f32>> = (0..lanes).map(|l| leaf(l, 50)).collect();
            let of_ranks: Vec<Vec<f32>> = leaves.chunks(lanes / ranks).map(tree_sum).collect();
            assert_eq!(bits(&tree_sum(&of_ranks)), bits(&tree_sum(&leaves)), "{lanes} lanes on {ranks} ranks");
        }
        assert!(!same_tree(6, 2) && !same_tree(8, 3) && !same_tree(8, 0));
        let leaves: Vec<Vec<f32>> = (0..6).map(|l| leaf(l, 50)).collect();
        let of_ranks: Vec<Vec<f32>> = leaves.chunks(3).map(tree_sum).collect();
        assert_ne!(bits(&tree_sum(&of_ranks)), bits(&tree_sum(&leaves)));
    }
}
