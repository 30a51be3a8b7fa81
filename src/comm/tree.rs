//! Sums in one fixed binary tree over the lanes of the global batch.
//!
//! Floating-point addition is not associative, so the order decides the bits. Here it is: level by level, each pair
//! of neighbours becomes one (left + right), an odd one at the end is carried up unchanged:
//! `((0+1)+(2+3))+4` for five leaves.

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
pub struct TreeSum {
    length: usize,
    /// (level, sum of 2^level lanes), levels strictly falling.
    digits: Vec<(u32, Vec<f32>)>,
    spare: Vec<Vec<f32>>,
}

impl TreeSum {
    /// For lanes of `length` elements.
    pub fn new(length: usize) -> Self {
        TreeSum { length, digits: Vec::new(), spare: Vec::new() }
    }

    /// A buffer of zeros for the next lane; one that an earlier addition set free where there is one.
    pub fn buffer(&mut self) -> Vec<f32> {
        match self.spare.pop() {
            Some(mut buffer) => {
                buffer.fill(0.0);
                buffer
            }
            None => vec![0.0; self.length],
        }
    }

    /// Adds the next lane. Panics if its length is not that of the sum.
    pub fn push(&mut self, lane: Vec<f32>) {
        assert_eq!(lane.len(), self.length, "a lane's length differs from the sum's");
        let (mut level, mut node) = (0, lane);
        while let Some((_, mut left)) = self.digits.pop_if(|(top, _)| *top == level) {
            add_right(&mut left, &node);
            self.spare.push(std::mem::replace(&mut node, left));
            level += 1;
        }
        self.digits.push((level, node));
    }

    /// The sum of the lanes so far (zeros without any); the next lane begins a new sum. Hand the result back with
    /// [`TreeSum::recycle`] to save an allocation.
    pub fn finish(&mut self) -> Vec<f32> {
        let Some((_, mut node)) = self.digits.pop() else { return self.buffer() };
        // the incomplete right edge of the tree: what is carried up meets ever larger left neighbours
        while let Some((_, mut left)) = self.digits.pop() {
            add_right(&mut left, &node);
            self.spare.push(std::mem::replace(&mut node, left));
        }
        node
    }

    /// Gives back a buffer that is no longer needed.
    pub fn recycle(&mut self, buffer: Vec<f32>) {
        if buffer.len() == self.length {
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
