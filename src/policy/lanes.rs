//! Lanes: the fixed pieces of the global batch. A rank runs one or more whole lanes, so what a lane computes does not
//! depend on the number of ranks, and neither does the sum over lanes.

use std::ops::Range;

use anyhow::{ensure, Result};
use tch::Tensor;

use super::gradient_sum::GradientSum;
use crate::{comm::Communicator, kernels::FlatBuffer};

/// The lanes of a run and those of this rank.
#[derive(Clone, Debug)]
pub struct Lanes {
    pub count: usize,
    mine: Range<usize>,
}

impl Lanes {
    /// # Errors
    /// `count` is not a multiple of the number of ranks; lists the numbers that are allowed.
    pub fn new(count: usize, comm: &dyn Communicator) -> Result<Self> {
        let ranks = comm.size();
        ensure!(
            count > 0 && count % ranks == 0,
            "{ranks} ranks cannot share {count} lanes evenly; possible numbers of ranks: {}",
            divisors(count).map(|d| d.to_string()).collect::<Vec<_>>().join(", ")
        );
        let per_rank = count / ranks;
        Ok(Lanes { count, mine: comm.rank() * per_rank..(comm.rank() + 1) * per_rank })
    }

    /// Lanes of this rank.
    pub fn mine(&self) -> Range<usize> {
        self.mine.clone()
    }

    /// Sum over all lanes of all ranks of the gradients of what `lane_loss` gives, as one flat buffer; on the host the
    /// same bits on every rank and at every number of ranks.
    pub fn sum_gradients(
        &self,
        sum: &mut GradientSum,
        comm: &dyn Communicator,
        mut lane_loss: impl FnMut(usize) -> Result<Tensor>,
    ) -> Result<FlatBuffer> {
        for lane in self.mine() {
            let loss = lane_loss(lane)?;
            sum.backward(&loss, lane + 1 == self.mine.end, comm)?;
        }
        Ok(sum.finish())
    }
}

/// Divisors of n in rising order.
pub fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n % d == 0)
}
