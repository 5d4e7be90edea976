//! Sinks that fail, stall, are slow, or panic.
#![allow(missing_docs)]

mod common;

use std::io::{self, Write};
use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use ckpt_image::{Codec, Error, Reader, Result, Writer, WriterOptions};
use common::*;

/// Runs `body` in a thread of its own and fails on a timeout.
fn in_time<T: Send + 'static>(what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(body()));
    told.recv_timeout(Duration::from_secs(60))
        .unwrap_or_else(|_| panic!("{what} hangs or panics"))
}

/// Takes that many bytes, then has no space left.
struct Full(usize);

impl Write for Full {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.0);
        self.0 -= taken;
        match taken {
            0 => Err(io::ErrorKind::StorageFull.into()),
            taken => Ok(taken),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write<W: Write + Send + 'static>(sink: W, codec: Codec) -> Result<W> {
    let mut writer = Writer::new(sink, &header(), options(codec))?;
    fill_small(&mut writer, 0)?;
    Ok(writer.finish()?.0)
}

#[test]
fn full_after_any_number_of_bytes() {
    for codec in CODECS {
        let len = tiny(codec).len();
        let step = if codec == Codec::None { 101 } else { 1 };
        for room in (0..len).step_by(step) {
            let outcome = in_time("a full sink", move || write(Full(room), codec).map(|_| ()));
            match outcome {
                Err(Error::Sink { source }) => {
                    assert_eq!(source.kind(), io::ErrorKind::StorageFull)
                }
                other => panic!("{codec}: {room} of {len} bytes: {other:?}"),
            }
        }
        assert_eq!(
            in_time("a sink", move || write(Full(len), codec))
                .unwrap()
                .0,
            0
        );
    }
}

#[test]
fn the_error_comes_soon_and_stays() {
    in_time("a full sink", || {
        let mut writer = Writer::new(Full(10_000), &header(), options(Codec::None)).unwrap();
        // More than can be in flight: the full sink must be reported before the last one.
        let mut failed = 0;
        for n in 0..20 {
            let mut chunk = writer.chunk();
            chunk.push(0, n << 20, PAGE as u32, &noise(n, 64 * PAGE));
            match writer.submit(chunk) {
                Ok(()) => assert_eq!(failed, 0, "an error was forgotten"),
                Err(Error::Sink { .. }) => failed += 1,
                Err(other) => panic!("{other}"),
            }
        }
        assert!(failed > 10, "{failed}");
        assert!(matches!(
            writer.section("meta", 1, b"x"),
            Err(Error::Sink { .. })
        ));
        let error = writer.finish().map(|_| ()).unwrap_err();
        assert!(error.to_string().contains("free some space"), "{error}");
    });
}

#[test]
fn the_kernel_says_no_space() {
    let full = std::fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let error = in_time("/dev/full", move || {
        write(full, Codec::default()).map(|_| ()).unwrap_err()
    });
    assert_eq!(
        error.io().map(io::Error::kind),
        Some(io::ErrorKind::StorageFull)
    );
}

#[test]
fn a_pipe_whose_reader_goes() {
    let (reader, pipe) = io::pipe().unwrap();
    drop(reader);
    let error = in_time("a pipe", move || {
        write(pipe, Codec::None).map(|_| ()).unwrap_err()
    });
    assert_eq!(
        error.io().map(io::Error::kind),
        Some(io::ErrorKind::BrokenPipe)
    );
}

#[test]
fn through_a_pipe() {
    let (mut reader, pipe) = io::pipe().unwrap();
    let writing = std::thread::spawn(move || write(pipe, Codec::Gzip(1)).map(|_| ()));
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut reader, &mut bytes).unwrap();
    writing.join().unwrap().unwrap();
    Reader::from_bytes(bytes)
        .unwrap()
        .verify(&mut |_, _| {})
        .unwrap();
}

/// Takes one byte at a time and is interrupted before each.
struct SlowSink(Vec<u8>, bool);

impl Write for SlowSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1 = !self.1;
        if self.1 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        self.0.extend(bytes.first());
        Ok(bytes.len().min(1))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn one_byte_at_a_time() {
    let sink = write(SlowSink(Vec::new(), false), Codec::Zstd(1)).unwrap();
    assert!(sink.0 == tiny(Codec::Zstd(1)));
}

struct Panics;

impl Write for Panics {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        panic!("this sink panics, as the test wants");
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_sink_that_panics() {
    let error = in_time("a panicking sink", || {
        write(Panics, Codec::None).map(|_| ()).unwrap_err()
    });
    assert!(matches!(error, Error::WriterDied), "{error}");
}

#[test]
fn a_sink_that_panics_stops_a_caller_that_waits_for_room() {
    let error = in_time("a caller of a panicking sink", || {
        let mut writer = Writer::new(Panics, &header(), options(Codec::None)).unwrap();
        let mut many = (0..50).map(|n| {
            let mut chunk = writer.chunk();
            chunk.push(0, n << 20, PAGE as u32, &page(n));
            writer.submit(chunk)
        });
        many.find_map(Result::err)
    });
    assert!(matches!(error, Some(Error::WriterDied)), "{error:?}");
}

/// A sink that waits at a gate, and sends a message when it is dropped.
struct Gate(Arc<(Mutex<bool>, Condvar)>, mpsc::Sender<()>);

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let open = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(open, |open| !*open).unwrap());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn chunks_in_flight_are_bounded() {
    let threads = 3;
    let gate = Arc::new((Mutex::new(false), Condvar::new()));
    let (tell, told) = mpsc::channel();
    let sink = Gate(gate.clone(), mpsc::channel().0);
    let submitting = std::thread::spawn(move || {
        let options = WriterOptions {
            codec: Codec::Lz4,
            threads,
        };
        let mut writer = Writer::new(sink, &header(), options).unwrap();
        for n in 0..50 {
            let mut chunk = writer.chunk();
            chunk.push(0, n << 20, PAGE as u32, &page(n));
            writer.submit(chunk).unwrap();
            tell.send(()).unwrap();
        }
        writer.finish().unwrap();
    });
    for n in 0..threads + 4 {
        told.recv_timeout(Duration::from_secs(60))
            .unwrap_or_else(|_| panic!("stuck after {n}"));
    }
    assert!(
        told.recv_timeout(Duration::from_millis(300)).is_err(),
        "one more was taken"
    );
    *gate.0.lock().unwrap() = true;
    gate.1.notify_all();
    assert_eq!(told.iter().count(), 50 - threads - 4);
    submitting.join().unwrap();
}

#[test]
fn chunks_held_by_the_caller_do_not_block() {
    in_time("many held chunks", || {
        let mut writer = Writer::new(Vec::new(), &header(), options(Codec::None)).unwrap();
        let mut held: Vec<_> = (0..30).map(|_| writer.chunk()).collect();
        for (n, chunk) in held.iter_mut().enumerate() {
            chunk.push(0, (n as u64) << 20, PAGE as u32, &page(n as u64));
        }
        writer.section("meta", 1, b"between").unwrap();
        held.into_iter()
            .for_each(|chunk| writer.submit(chunk).unwrap());
        assert_eq!(writer.finish().unwrap().1.chunks, 30);
    });
}

impl Drop for Gate {
    fn drop(&mut self) {
        let _ = self.1.send(());
    }
}

#[test]
fn dropping_an_unfinished_writer_joins_its_threads() {
    let (tell, told) = mpsc::channel();
    in_time("a dropped writer", move || {
        let gate = Arc::new((Mutex::new(true), Condvar::new()));
        let mut writer = Writer::new(Gate(gate, tell), &header(), options(Codec::Zstd(3))).unwrap();
        fill_small(&mut writer, 1 << 20).unwrap();
        drop(writer);
        // The writer thread has ended and dropped the sink.
        told.try_recv().expect("the sink is still there");
    });
}
