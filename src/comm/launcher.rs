//! Was this process started by an MPI launcher? Read from the environment, so that MPI stays untouched otherwise.

use anyhow::{bail, Result};

/// How this process was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Launcher {
    /// By hand: one process.
    None,
    /// By an MPI launcher; the number of ranks, and of those on this host, where the launcher tells them.
    Mpi { ranks: Option<usize>, on_host: Option<usize> },
}

/// Variables that a launcher sets for each rank: PMI-1/2 (MPICH, Intel MPI, MVAPICH, `srun --mpi=pmi2`), PMIx
/// (`srun --mpi=pmix`, PRRTE), Open MPI's mpirun, Cray PALS.
const RANK_VARIABLES: [&str; 5] = ["PMI_RANK", "PMI_FD", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID"];
/// Variables that tell the number of ranks on the host: MPICH's mpirun, Open MPI's, Cray PALS.
const HOST_VARIABLES: [&str; 3] = ["MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "PALS_LOCAL_SIZE"];
/// Variables that tell the number of ranks.
const SIZE_VARIABLES: [&str; 2] = ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE"];

/// `variable` looks up the environment.
///
/// # Errors
/// Several tasks started by `srun` without its MPI support: each would believe that it is alone.
pub(super) fn detect(variable: impl Fn(&str) -> Option<String>) -> Result<Launcher> {
    let launched = RANK_VARIABLES.iter().chain(&SIZE_VARIABLES).any(|name| variable(name).is_some());
    let slurm_tasks: Option<usize> = variable("SLURM_STEP_NUM_TASKS").and_then(|text| text.parse().ok());
    if launched {
        let told = SIZE_VARIABLES.iter().find_map(|name| variable(name)?.parse().ok());
        // under srun --mpi=pmix only Slurm tells the size; inside mpirun its step counts mpirun's daemons instead
        let by_srun = variable("SLURM_PROCID").is_some() && variable("PMIX_RANK") == variable("SLURM_PROCID");
        let on_host = HOST_VARIABLES.iter().find_map(|name| variable(name)?.parse().ok());
        let of_step = variable("SLURM_STEP_TASKS_PER_NODE").as_deref().and_then(most_on_a_node);
        let on_host = on_host.or(of_step.filter(|_| variable("SLURM_PROCID").is_some()));
        return Ok(Launcher::Mpi { ranks: told.or(slurm_tasks.filter(|_| by_srun)), on_host });
    }
    match slurm_tasks {
        Some(tasks) if tasks > 1 => bail!(
            "srun started {tasks} tasks without MPI support: start rldiff with `srun --mpi=pmix` or `srun --mpi=pmi2` \
             (`srun --mpi=list` shows what this cluster has)"
        ),
        _ => Ok(Launcher::None),
    }
}

/// The most tasks of a node in Slurm's "8(x15),4".
fn most_on_a_node(text: &str) -> Option<usize> {
    text.split(',')
        .map(|part| part.split('(').next()?.trim().parse().ok())
        .collect::<Option<Vec<usize>>>()?
        .into_iter()
        .max()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the world alone.
    fn world(ranks: Option<usize>) -> Launcher {
        Launcher::Mpi { ranks, on_host: None }
    }

    fn with(variables: &[(&str, &str)]) -> Result<Launcher> {
        detect(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.to_string()))
    }

    #[test]
    fn launchers_are_recognised() {
        assert_eq!(with(&[]).unwrap(), Launcher::None);
        assert_eq!(with(&[("PMI_RANK", "1"), ("PMI_SIZE", "4")]).unwrap(), world(Some(4)));
        assert_eq!(with(&[("OMPI_COMM_WORLD_SIZE", "2")]).unwrap(), world(Some(2)));
        assert_eq!(with(&[("PMIX_RANK", "0")]).unwrap(), world(None));
        let pmix = [("PMIX_RANK", "3"), ("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "8")];
        assert_eq!(with(&pmix).unwrap(), world(Some(8)));
    }

    #[test]
    fn ranks_of_the_host_are_told_by_the_launcher() {
        for (variables, wanted) in [
            (&[("PMI_RANK", "0"), ("MPI_LOCALNRANKS", "128")][..], Some(128)),
            (&[("OMPI_COMM_WORLD_SIZE", "9"), ("OMPI_COMM_WORLD_LOCAL_SIZE", "3")], Some(3)),
            (&[("PMI_RANK", "0"), ("SLURM_PROCID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "8(x15),4")], Some(8)),
            (&[("PMI_RANK", "0"), ("SLURM_PROCID", "0"), ("SLURM_STEP_TASKS_PER_NODE", "many")], None),
            (&[("PMI_RANK", "0")], None),
        ] {
            let Launcher::Mpi { on_host, .. } = with(variables).unwrap() else { panic!("{variables:?}: no launcher") };
            assert_eq!(on_host, wanted, "{variables:?}");
        }
    }

    #[test]
    fn slurm_tasks_without_mpi_are_refused() {
        assert_eq!(with(&[("SLURM_STEP_NUM_TASKS", "1")]).unwrap(), Launcher::None);
        // a batch script knows the size of its job, but is itself one process
        assert_eq!(with(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]).unwrap(), Launcher::None);
        let message = with(&[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "8")]).unwrap_err().to_string();
        assert!(message.contains("srun --mpi=pmix"), "{message}");
    }
}
