//! Kernels and containers that refuse what a pool would like to use: it is made all the same.
//!
//! A filter answers for the system in a thread of its own and in those it starts.

use std::thread;

use kvcellar_engine::pool::pages;

use crate::mounts::{Tmpfs, touch_all};
use crate::place::{Place, Purpose};
use crate::stock::Stock;

const POPULATE_WRITE: u32 = 23;

/// A refusal: the call, what its third argument must be (any: `None`), and the error it answers.
#[derive(Clone, Copy)]
struct Refusal(libc::c_long, Option<u32>, i32);

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Goes on where the word equals `k`, else leaves out `skip` statements.
const fn equal_or_skip(k: u32, skip: u8) -> libc::sock_filter {
    libc::sock_filter { code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16, jt: 0, jf: skip, k }
}

/// Makes this thread's system refuse these calls from now on. `false`: filters are not to be had
/// here.
fn refuse(refusals: &[Refusal]) -> bool {
    let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    let mut program = Vec::new();
    for Refusal(call, third, errno) in refusals {
        let answer = statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned());
        program.push(statement(load, 0));
        program.push(equal_or_skip(call.cast_unsigned() as u32, if third.is_some() { 3 } else { 1 }));
        if let Some(third) = third {
            // The third argument's low half: 16 bytes of head, then eight for each argument.
            program.push(statement(load, 32));
            program.push(equal_or_skip(*third, 1));
        }
        program.push(answer);
    }
    program.push(statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the program lives through the calls, which copy it; they change this thread only.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    };
    if !done {
        println!("skipped: no filter can be set here ({})", std::io::Error::last_os_error());
    }
    done
}

/// Runs `work` where the system refuses.
fn under<T: Send>(refusals: &[Refusal], work: impl FnOnce() -> T + Send) -> Option<T> {
    thread::scope(|scope| scope.spawn(|| refuse(refusals).then(work)).join().expect("no panic"))
}

fn no_populate(errno: i32) -> Refusal {
    Refusal(libc::SYS_madvise, Some(POPULATE_WRITE), errno)
}

#[test]
fn a_kernel_that_does_not_populate_gets_its_pages_otherwise() {
    // Before 5.14 and gVisor; seccomp profiles.
    for errno in [libc::EINVAL, libc::EPERM, libc::ENOSYS] {
        let place = Place::new();
        let purpose = Purpose::of(500, 2, 4096);
        let Some(()) = under(&[no_populate(errno)], || {
            assert_eq!(pages::refusal().and_then(|error| error.raw_os_error()), Some(errno));
            let mut last = (0, 0);
            let opened = purpose.open_with(place.path(), &mut |done, total| last = (done, total)).expect("a pool");
            assert_eq!(last, (opened.pool.bytes(), opened.pool.bytes()), "populated to the end");
            let entry = kvcellar_engine::pool::registry::list(place.path()).expect("listed").remove(0);
            assert_eq!(entry.bytes, opened.pool.bytes().next_multiple_of(4096), "all of it exists");
            let mut stock = Stock::of(opened);
            stock.store(&[1, 2, 3], |_| true);
        }) else {
            return;
        };
        // Adopted in the same way: contents stay.
        under(&[no_populate(errno)], || {
            let opened = purpose.open(place.path()).expect("the pool");
            assert!(opened.adopted);
            assert_eq!(Stock::of(opened).hit(&[1, 2, 3]), 48);
        });
    }
}

#[test]
fn without_allocation_either_pages_are_written_through_the_file() {
    let refusals = [no_populate(libc::EPERM), Refusal(libc::SYS_fallocate, None, libc::EOPNOTSUPP)];
    let place = Place::new();
    let purpose = Purpose::of(100, 2, 4096);
    under(&refusals, || {
        let opened = purpose.open(place.path()).expect("a pool");
        let entry = kvcellar_engine::pool::registry::list(place.path()).expect("listed").remove(0);
        assert_eq!(entry.bytes, opened.pool.bytes(), "all of it exists");
        touch_all(&opened.pool);
    });
}

/// A file with holes, on a file system that has no page left for them: whatever the way, an error
/// and never a SIGBUS.
#[test]
fn want_of_memory_is_an_error_that_names_dram_size_in_every_way() {
    let ways: [&[Refusal]; 3] = [
        &[],
        &[no_populate(libc::EINVAL)],
        &[no_populate(libc::EINVAL), Refusal(libc::SYS_fallocate, None, libc::ENOSYS)],
    ];
    for (way, refusals) in ways.into_iter().enumerate() {
        let Some(tmpfs) = Tmpfs::mount(2 << 20) else { return };
        let purpose = Purpose::of(40, 2, 4096);
        drop(purpose.open(&tmpfs.path).expect("a pool"));
        let file = std::fs::File::options().write(true).open(purpose.file(&tmpfs.path, 0)).expect("opened");
        let len = file.metadata().expect("looked at").len();
        file.set_len(len - 20 * purpose.geometry.slot_bytes).expect("cut");
        file.set_len(len).expect("grown");
        tmpfs.fill_up(0);
        under(refusals, || match purpose.open(&tmpfs.path) {
            // Made anew, as large as what the old file gave back.
            Ok(opened) => {
                assert!(!opened.adopted, "way {way}");
                touch_all(&opened.pool);
            }
            Err(error) => assert!(error.to_string().contains("dram_size"), "way {way}: {error}"),
        });
    }
}

#[test]
fn advice_that_is_refused_costs_speed_only() {
    let refusals = [
        Refusal(libc::SYS_madvise, Some(libc::MADV_HUGEPAGE.cast_unsigned()), libc::EINVAL),
        Refusal(libc::SYS_mbind, None, libc::EPERM),
    ];
    let place = Place::new();
    under(&refusals, || {
        let opened = Purpose::small().open(place.path()).expect("a pool");
        assert_eq!(opened.pool.slot_count(), 8);
        touch_all(&opened.pool);
    });
}
