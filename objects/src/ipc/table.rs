//! `/proc/sysvipc`: all System V objects of our IPC namespace, regardless of permissions.

use std::io::ErrorKind;

use crate::error::{Error, Result};

/// Kinds of System V objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Shared memory.
    Shm,
    /// Semaphore sets.
    Sem,
    /// Message queues.
    Msg,
}

impl Type {
    /// Its name in files and sysctls.
    pub fn name(self) -> &'static str {
        match self {
            Type::Shm => "shm",
            Type::Sem => "sem",
            Type::Msg => "msg",
        }
    }

    /// Its name for display.
    pub fn label(self) -> &'static str {
        match self {
            Type::Shm => "System V shared memory",
            Type::Sem => "System V semaphore set",
            Type::Msg => "System V message queue",
        }
    }

    /// The option of ipcrm(1) for an id.
    pub fn ipcrm_option(self) -> &'static str {
        match self {
            Type::Shm => "-m",
            Type::Sem => "-s",
            Type::Msg => "-q",
        }
    }
}

/// One line of the kernel's table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    columns: Vec<(String, i64)>,
}

impl Row {
    /// A number by column name; 0 if the column does not exist.
    pub fn get(&self, column: &str) -> i64 {
        let found = self.columns.iter().find(|(name, _)| name == column);
        found.map_or(0, |(_, value)| *value)
    }

    /// Its id.
    pub fn id(&self) -> i32 {
        (self.get("shmid") | self.get("semid") | self.get("msqid")) as i32
    }

    /// Its key, 0 for a private one.
    pub fn key(&self) -> i32 {
        self.get("key") as i32
    }
}

/// All objects of that kind; empty if the kernel lacks it.
pub fn read(kind: Type) -> Result<Vec<Row>> {
    let path = format!("/proc/sysvipc/{}", kind.name());
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(parse(&text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::file("read", path)(e)),
    }
}

fn parse(text: &str) -> Vec<Row> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or("").split_whitespace().collect();
    lines
        .map(|line| {
            let values = line.split_whitespace().zip(&names);
            let columns = values.map(|(word, name)| {
                let value = match *name {
                    "perms" => i64::from_str_radix(word, 8),
                    _ => word.parse(),
                };
                ((*name).to_owned(), value.unwrap_or(0))
            });
            Row {
                columns: columns.collect(),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_by_their_columns() {
        let text = "       key      semid perms      nsems   uid   gid  cuid  cgid      otime      ctime\n\
                    -559038737      98309   600          3 65534 65533     7     8         44 1795318593\n";
        let rows = parse(text);
        assert_eq!(rows.len(), 1);
        let row = &rows[0];
        assert_eq!((row.id(), row.key()), (98309, 0xdead_beef_u32 as i32));
        assert_eq!((row.get("perms"), row.get("nsems")), (0o600, 3));
        assert_eq!((row.get("cuid"), row.get("ctime")), (7, 1795318593));
        assert_eq!(row.get("nattch"), 0);
        assert!(parse("").is_empty());
    }
}
