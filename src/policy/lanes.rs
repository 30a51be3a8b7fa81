//! Lanes: the fixed pieces of the global batch. A rank runs one or more whole lanes, so what a lane computes does not
//! depend on the number of ranks, and neither does the sum over lanes.

use std::ops::Range;

use anyhow::{ensure, Result};
use tch::Tensor;

use crate::{
    comm::{Communicator, TreeSum},
    models::parameters::FlatParameters,
};

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

    /// Sum over all lanes of all ranks of the gradients that `lane_gradient` gives (one tensor per leaf of `params`,
    /// in layout order), as one flat buffer; the same bits on every rank.
    pub fn sum_gradients(
        &self,
        params: &FlatParameters,
        sum: &mut TreeSum,
        comm: &dyn Communicator,
        mut lane_gradient: impl FnMut(usize) -> Result<Vec<Tensor>>,
    ) -> Result<Vec<f32>> {
        for lane in self.mine() {
            let gradients = lane_gradient(lane)?;
            let mut flat = sum.buffer();
            params.flatten(gradients, &mut flat)?;
            sum.push(flat);
        }
        let mut total = sum.finish();
        comm.all_reduce_sum_f32(&mut total)?;
        Ok(total)
    }
}

/// Divisors of n in rising order.
pub fn divisors(n: usize) -> impl Iterator<Item = usize> {
    (1..=n).filter(move |d| n % d == 0)
}
