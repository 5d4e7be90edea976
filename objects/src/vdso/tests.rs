//! Executes redirected code: into this kernel's vDSO, and into system calls.
#![allow(unsafe_code)]

use super::redirect::{Function, Present, functions, lead_on};
use super::*;

/// Executable memory with a copy of the vDSO in which only redirected functions can be executed.
struct Copy {
    at: *mut u8,
    len: usize,
    functions: Vec<Function>,
}

impl Copy {
    fn new(present: &Present) -> Self {
        let mut old = code();
        let functions = functions(&old).expect("it is an ELF file");
        for pair in functions.windows(2) {
            old[pair[0].offset as usize..pair[1].offset as usize].fill(0xcc);
        }
        let new = lead_on(&old, present).expect("all of its functions are known");
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new memory, written within its bounds.
        let at = unsafe {
            let at = libc::mmap(std::ptr::null_mut(), new.len(), prot, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            std::ptr::copy_nonoverlapping(new.as_ptr(), at.cast(), new.len());
            at.cast()
        };
        Self {
            at,
            len: new.len(),
            functions,
        }
    }

    /// Calls a function with five operands; `None` if the kernel has no function of that name.
    fn call(&self, name: &str, args: [usize; 5]) -> Option<i64> {
        type Code = extern "C" fn(usize, usize, usize, usize, usize) -> i64;
        let function = self.functions.iter().find(|f| f.name == name)?;
        // SAFETY: code of that calling convention is there; operands are live pointers or values.
        let code: Code = unsafe { std::mem::transmute(self.at.add(function.offset as usize)) };
        Some(code(args[0], args[1], args[2], args[3], args[4]))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // SAFETY: it is ours.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn own() -> Present {
    let lent = Lent::now();
    let vdso = lent.pieces.iter().find(|v| v.name == VmaName::Vdso);
    Present::of(&lent.code, vdso.expect("there is one").start).expect("it is an ELF file")
}

fn all_functions_answer(copy: &Copy) {
    let mut t = [0i64; 2];
    let at = t.as_mut_ptr() as usize;
    let seconds = |t: &[i64; 2]| t[0];
    let now = || crate::clock::clock(libc::CLOCK_REALTIME) as i64 / 1_000_000_000;
    let near = |s: i64| assert!((now() - s).abs() <= 1, "{s} is not the time");
    let call = |name: &str, args: [usize; 5]| copy.call(name, args);
    assert_eq!(call("__vdso_clock_gettime", [0, at, 0, 0, 0]), Some(0));
    near(seconds(&t));
    assert_eq!(call("__vdso_gettimeofday", [at, 0, 0, 0, 0]), Some(0));
    near(seconds(&t));
    near(call("__vdso_time", [0; 5]).expect("it is in every vDSO"));
    assert!(matches!(
        call("__vdso_clock_getres", [0, at, 0, 0, 0]),
        None | Some(0)
    ));
    let mut cpu = u32::MAX;
    let at = &raw mut cpu as usize;
    assert_eq!(call("__vdso_getcpu", [at, 0, 0, 0, 0]), Some(0));
    assert_ne!(cpu, u32::MAX);
    let mut random = [0u8; 16];
    let at = random.as_mut_ptr() as usize;
    if let Some(n) = call("__vdso_getrandom", [at, 16, 0, 0, 0]) {
        assert_eq!(n, 16);
        assert_ne!(random, [0; 16]);
    }
}

#[test]
fn functions_lead_to_those_of_the_present_vdso() {
    all_functions_answer(&Copy::new(&own()));
}

#[test]
fn functions_lead_to_system_calls() {
    let copy = Copy::new(&Present::default());
    all_functions_answer(&copy);
    // A query for the size of the state returns ENOSYS.
    let asked = copy.call("__vdso_getrandom", [0, 0, 0, 0, usize::MAX]);
    assert!(matches!(asked, None | Some(-38)), "{asked:?}");
}

#[test]
fn an_unknown_function_is_named() {
    let mut old = code();
    let (name, other) = (b"getcpu\0", b"foobar\0");
    while let Some(at) = old.windows(name.len()).position(|w| w == name) {
        old[at..at + name.len()].copy_from_slice(other);
    }
    let why = lead_on(&old, &own()).expect_err("no vDSO has such a function");
    assert!(why.contains("foobar"), "{why}");
    assert!(lead_on(&old[..100], &own()).is_err());
    assert!(lead_on(b"", &own()).is_err());
}
