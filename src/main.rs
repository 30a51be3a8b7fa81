fn main() { println!("{}", tch::get_num_threads()); let _u = mpi::initialize(); println!("{:?}", hdf5::library_version()); }
