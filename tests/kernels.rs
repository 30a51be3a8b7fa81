//! The CUDA kernels without a GPU: the unchanged sources run on the host (`kernels/host_emulation.h`) against the
//! references, and NVRTC compiles them for A100 and H100, with registers and spills checked. Run with --nocapture to see
//! the largest error of each quantity.

#[path = "kernels/adamw.rs"]
mod adamw;
#[path = "kernels/cases.rs"]
mod cases;
#[path = "kernels/emulated.rs"]
mod emulated;
#[path = "kernels/geglu.rs"]
mod geglu;
#[path = "kernels/group_norm.rs"]
mod group_norm;
#[path = "kernels/layer_norm.rs"]
mod layer_norm;
#[path = "kernels/transition.rs"]
mod transition;

use std::collections::BTreeMap;
use std::path::PathBuf;

use cases::Observed;
use half::{bf16, f16};
use rldiff::kernels::cuda::{compile, is_driver_present, Architecture, Gpu, Source, Toolkit, SOURCES};

/// Runs a case for each number type of the model's outputs.
macro_rules! for_each_type {
    ($machines:expr, $seen:expr, $($case:ident)::+) => {{
        $($case)::+::<f32>($machines, $seen);
        $($case)::+::<bf16>($machines, $seen);
        $($case)::+::<f16>($machines, $seen);
    }};
}

#[test]
fn philox_gives_the_published_words() {
    cases::philox_known_answers(&emulated::machines());
}

#[test]
fn normal_numbers_are_the_hosts() {
    let mut seen = Observed::default();
    cases::normal_numbers(&emulated::machines(), &mut seen);
    seen.print();
}

#[test]
fn ddim_step_draws_and_scores_as_the_reference() {
    let mut seen = Observed::default();
    for_each_type!(&emulated::machines(), &mut seen, transition::draws_and_scores);
    seen.print();
}

#[test]
fn clipped_surrogate_gives_the_terms_and_gradients_of_the_reference() {
    let mut seen = Observed::default();
    for_each_type!(&emulated::machines(), &mut seen, transition::surrogate);
    seen.print();
}

#[test]
fn the_first_ratio_is_exactly_one() {
    let machines = emulated::machines();
    transition::first_ratio::<f32>(&machines);
    transition::first_ratio::<bf16>(&machines);
    transition::first_ratio::<f16>(&machines);
}

#[test]
fn adamw_steps_to_the_bits_of_the_reference() {
    let mut seen = Observed::default();
    for_each_type!(&emulated::machines(), &mut seen, adamw::steps);
    adamw::norm_shows_what_is_not_finite(&emulated::machines());
    adamw::the_network_follows(&emulated::machines(), tch::Device::Cpu);
    seen.print();
}

#[test]
fn layer_norm_goes_both_ways_as_libtorch_in_f64() {
    let machines = emulated::machines();
    let mut seen = Observed::default();
    layer_norm::both_passes::<f32, f32>(&machines, 0.5, 0.0, &mut seen);
    layer_norm::both_passes::<f32, f32>(&machines, 100.0, 0.0, &mut seen);
    layer_norm::both_passes::<bf16, bf16>(&machines, 0.5, 3.9e-3, &mut seen);
    layer_norm::both_passes::<f16, f16>(&machines, 0.5, 4.9e-4, &mut seen);
    layer_norm::both_passes::<bf16, f32>(&machines, 0.5, 3.9e-3, &mut seen);
    let [machine, _] = machines;
    layer_norm::autograd(machine, tch::Device::Cpu, &mut seen);
    seen.print();
}

#[test]
fn geglu_goes_both_ways_as_libtorch_in_f64() {
    let machines = emulated::machines();
    let mut seen = Observed::default();
    geglu::both_passes::<f32>(&machines, 0.0, &mut seen);
    geglu::both_passes::<bf16>(&machines, 3.9e-3, &mut seen);
    geglu::both_passes::<f16>(&machines, 4.9e-4, &mut seen);
    let [machine, _] = machines;
    geglu::autograd(machine, tch::Device::Cpu, &mut seen);
    seen.print();
}

#[test]
fn group_norm_silu_goes_both_ways_as_the_reference() {
    let mut seen = Observed::default();
    let machines = emulated::machines();
    group_norm::both_passes::<f32, f32>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<f32, f32>(&machines, 100.0, &mut seen);
    group_norm::both_passes::<bf16, bf16>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<f16, f16>(&machines, 0.5, &mut seen);
    group_norm::both_passes::<bf16, f32>(&machines, 0.5, &mut seen);
    seen.print();
}

#[test]
fn group_norm_silu_is_differentiable_in_libtorch() {
    let mut seen = Observed::default();
    let [machine, _] = emulated::machines();
    group_norm::autograd(machine, tch::Device::Cpu, &mut seen);
    seen.print();
}

#[test]
fn misfits_are_refused() {
    transition::misfits_are_refused(&emulated::machines());
}

#[test]
fn without_a_driver_opening_a_gpu_says_so() {
    if is_driver_present() {
        eprintln!("SKIPPED: this machine has an NVIDIA driver");
        return;
    }
    assert_eq!(Gpu::count().unwrap(), 0);
    let error = Gpu::open(0).err().expect("no GPU can be opened without a driver").to_string();
    assert!(error.contains("libcuda.so.1"), "{error}");
}

/// NVRTC; None, loudly, where it is missing. In `make test` it must not be: tools/setup-tests.sh puts it into the venv
/// of `python-for-tests`.
fn toolkit() -> Option<Toolkit> {
    let python = PathBuf::from(std::env::var_os("RLDIFF_TEST_PYTHON").unwrap_or_default());
    let libraries = python.ancestors().nth(2).map(|venv| venv.join("lib")).unwrap_or_default();
    let versions = std::fs::read_dir(libraries).into_iter().flatten().flatten().map(|entry| entry.path());
    let ours = versions.map(|path| path.join("site-packages/nvidia/cu13")).find(|path| path.is_dir());
    match Toolkit::find(ours.as_slice()) {
        Ok(toolkit) => Some(toolkit),
        Err(error) if python.ends_with("bin/python-for-tests") => panic!("{error:#}"),
        Err(error) => {
            eprintln!("SKIPPED: kernels through NVRTC: {error:#}");
            None
        }
    }
}

/// What ptxas says of a kernel.
#[derive(Debug, Default)]
struct Usage {
    registers: u32,
    spill_stores: u32,
    spill_loads: u32,
    stack_frame: u32,
}

fn usages(log: &str) -> BTreeMap<String, Usage> {
    let number_before = |line: &str, words: &str| -> Option<u32> {
        line[..line.find(words)?].trim_end().rsplit(' ').next()?.parse().ok()
    };
    let mut all = BTreeMap::new();
    let mut kernel = None;
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            kernel = rest.split('\'').next().map(String::from);
        }
        let Some(usage) = kernel.as_ref().map(|kernel| all.entry(kernel.clone()).or_insert_with(Usage::default)) else {
            continue;
        };
        if let Some(bytes) = number_before(line, " bytes stack frame") {
            usage.stack_frame = bytes;
            usage.spill_stores = number_before(line, " bytes spill stores").unwrap();
            usage.spill_loads = number_before(line, " bytes spill loads").unwrap();
        }
        if let Some(registers) = number_before(line, " registers") {
            usage.registers = registers;
        }
    }
    all
}

#[test]
fn nvrtc_compiles_every_kernel_without_spills() {
    let Some(toolkit) = toolkit() else { return };
    println!("NVRTC {:?}, headers in {}", toolkit.version(), toolkit.include().display());
    for architecture in [Architecture { major: 8, minor: 0 }, Architecture { major: 9, minor: 0 }] {
        for source in &SOURCES {
            let compiled = compile(source, architecture, &toolkit).unwrap();
            assert!(compiled.cubin.starts_with(b"\x7fELF"));
            let usages = usages(&compiled.log);
            assert_eq!(usages.len(), source.kernels.len(), "{}: {usages:?}", source.name);
            for kernel in source.kernels {
                let usage = &usages[*kernel];
                println!("sm_{}{} {kernel:<40} {usage:?}", architecture.major, architecture.minor);
                assert_eq!((usage.spill_stores, usage.spill_loads), (0, 0), "{kernel}: {usage:?}");
                // 64: a block of 1024 threads, or four of 256, fill the 65,536 registers of a multiprocessor. The passes of
                // the normalisations have 64 bytes on the way in every thread; two blocks are enough for them.
                let most =
                    if kernel.starts_with("group_norm_silu") || kernel.starts_with("layer_norm") { 128 } else { 64 };
                assert!((1..=most).contains(&usage.registers), "{kernel}: {usage:?}");
                // only sincosf's way for large arguments, never taken, may have one
                assert!(
                    usage.stack_frame <= 32 && (usage.stack_frame == 0 || *kernel == "normal_rows"),
                    "{kernel}: {usage:?}"
                );
            }
        }
    }
}

#[test]
fn a_kernel_that_does_not_compile_shows_nvrtcs_log() {
    let Some(toolkit) = toolkit() else { return };
    let broken = Source { name: "broken", text: "__global__ void f() { undeclared_name = 1; }", kernels: &["f"] };
    let error = compile(&broken, Architecture { major: 9, minor: 0 }, &toolkit).unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains("broken.cu(1)") && text.contains("undeclared_name"), "{text}");
}
