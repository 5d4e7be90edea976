//! Snapshots as values: their fields, and forged values for them.

use std::collections::BTreeMap;

use ciborium::Value;

/// A value of the snapshot, by keys and indices.
pub type Place = Vec<usize>;

/// All values that hold no others; of a list's elements, the first that has a field of that name.
pub fn leaves(value: &Value, name: &str, at: &mut Place, found: &mut BTreeMap<String, Place>) {
    match value {
        Value::Map(entries) => {
            for (number, (key, value)) in entries.iter().enumerate() {
                let key = key.as_text().map_or_else(|| "?".to_owned(), str::to_owned);
                at.push(number);
                leaves(value, &format!("{name}.{key}"), at, found);
                at.pop();
            }
        }
        Value::Array(elements) => {
            for (number, value) in elements.iter().enumerate() {
                at.push(number);
                leaves(value, &format!("{name}[]"), at, found);
                at.pop();
            }
        }
        _ => {
            let kind = match value {
                Value::Null => "null",
                _ => "",
            };
            found
                .entry(format!("{name}{kind}"))
                .or_insert_with(|| at.clone());
        }
    }
}

pub fn at<'a>(value: &'a mut Value, place: &[usize]) -> &'a mut Value {
    place.iter().fold(value, |value, &number| match value {
        Value::Map(entries) => &mut entries[number].1,
        Value::Array(elements) => &mut elements[number],
        _ => panic!("the place is in the value"),
    })
}

/// Forged values for a field.
pub fn forgeries(value: &Value) -> Vec<Value> {
    let number = |n: i128| Some(Value::Integer(n.try_into().ok()?));
    let paths = [
        "/etc/shadow",
        "/proc/1/maps",
        "/proc/kallsyms",
        "/dev/kmsg",
        "/",
    ];
    match value {
        Value::Integer(was) => {
            let was = i128::from(*was);
            let all = [
                0,
                1,
                was + 1,
                was | 1 << 21,
                -1,
                u32::MAX.into(),
                u64::MAX.into(),
            ];
            all.into_iter()
                .filter(|n| *n != was)
                .filter_map(number)
                .collect()
        }
        Value::Bool(was) => vec![Value::Bool(!was)],
        Value::Text(_) => paths
            .iter()
            .map(|path| Value::Text((*path).into()))
            .collect(),
        Value::Bytes(was) => {
            let flipped = was.iter().map(|byte| byte ^ 0x41).collect();
            let of_path = |path: &&str| Value::Bytes(path.as_bytes().to_vec());
            let all = [Value::Bytes(flipped), Value::Bytes(Vec::new())];
            all.into_iter().chain(paths.iter().map(of_path)).collect()
        }
        _ => vec![
            Value::Integer(0.into()),
            Value::Text(paths[0].into()),
            Value::Bool(true),
        ],
    }
}

/// Numbers that look random and are the same for the same seed.
pub struct Random(u64);

impl Random {
    /// The seed that is given in `CKPT_SEED`, or a fresh one, which is printed.
    pub fn seeded() -> Self {
        let given = std::env::var("CKPT_SEED")
            .ok()
            .and_then(|text| text.parse().ok());
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let seed = given.unwrap_or_else(|| now.map_or(1, |now| now.as_nanos() as u64));
        println!("again with CKPT_SEED={seed}");
        Self(seed)
    }

    /// One below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        // SplitMix64 (Steele and others, 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % end as u64) as usize
    }
}
