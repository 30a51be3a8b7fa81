//! One rank: every collective operation is a no-op.

use super::Communicator;
use anyhow::Result;

/// The communicator of a run that consists of this process alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Local;

impl Communicator for Local {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn local_rank(&self) -> (usize, usize) {
        (0, 1)
    }

    fn barrier(&self) -> Result<()> {
        Ok(())
    }

    fn broadcast_bytes(&self, _data: &mut Vec<u8>, _root: usize) -> Result<()> {
        Ok(())
    }

    fn broadcast_f32(&self, _data: &mut [f32], _root: usize) -> Result<()> {
        Ok(())
    }

    fn all_gather_bytes(&self, data: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ok(vec![data.to_vec()])
    }

    fn all_reduce_sum_f32(&self, _data: &mut [f32]) -> Result<()> {
        Ok(())
    }

    fn all_reduce_sum_bf16(&self, _data: &mut [half::bf16]) -> Result<()> {
        Ok(())
    }

    fn abort(&self, code: i32) -> ! {
        super::mpi::end_world(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_keeps_its_data() {
        let mut values = [1.5f32, -0.0];
        Local.all_reduce_sum_f32(&mut values).unwrap();
        assert_eq!(values.map(f32::to_bits), [1.5f32.to_bits(), (-0.0f32).to_bits()]);
        assert_eq!(Local.all_gather_bytes(b"x").unwrap(), [b"x".to_vec()]);
        assert_eq!((Local.rank(), Local.size(), Local.local_rank()), (0, 1, (0, 1)));
    }

    #[test]
    fn agreement_of_one_rank_names_it() {
        assert!(crate::comm::agree(&Local, Ok(())).is_ok());
        let error = crate::comm::agree(&Local, Err(anyhow::anyhow!("inner").context("outer"))).unwrap_err();
        assert_eq!(error.to_string(), "rank 0: outer: inner");
        // what all ranks (one, here) failed at alike names none of them
        let failed = crate::comm::all_made::<u8>(&Local, Err(anyhow::anyhow!("inner").context("outer")));
        assert_eq!(failed.unwrap_err().to_string(), "outer: inner");
        assert_eq!(crate::comm::all_made(&Local, Ok(3)).unwrap(), 3);
    }
}
