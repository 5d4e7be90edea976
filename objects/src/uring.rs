//! io_uring(7), which is not supported: requests in flight are not visible. Reported once for each process, with a
//! way to disable it.

use crate::error::Obstacle;
use crate::source::Source;

/// The name of its files in links and mappings.
pub const NAME: &str = "io_uring";

/// Programs with an option of their own, by the beginning of their name.
const SWITCHES: [(&str, &str); 6] = [
    (
        "node",
        "UV_USE_IO_URING=0 in its environment; where its libuv ignores that (as on Debian 13), with sysctl \
         kernel.io_uring_disabled=2",
    ),
    ("postgres", "io_method=worker in postgresql.conf"),
    ("mariadbd", "--innodb-use-native-aio=0"),
    ("mysqld", "--innodb-use-native-aio=0"),
    ("qemu-system", "aio=threads for its drives"),
    ("fio", "another --ioengine"),
];

/// The obstacle for a process.
pub fn obstacle(source: &Source) -> Obstacle {
    let remedy = match switch(source) {
        Some(switch) => format!("start it with {switch}"),
        None => "start it without io_uring, or turn that off for all programs: sysctl \
                 kernel.io_uring_disabled=2"
            .into(),
    };
    Obstacle::new(
        source.title(),
        "uses io_uring, which is not supported",
        remedy,
    )
}

/// How to disable it in this program, if known.
fn switch(source: &Source) -> Option<&'static str> {
    let exe = std::fs::read_link(source.dir.join("exe")).unwrap_or_default();
    let name = exe.file_name()?.to_str()?.to_owned();
    let found = SWITCHES
        .iter()
        .find(|(program, _)| name.starts_with(program));
    found.map(|(_, switch)| *switch)
}
