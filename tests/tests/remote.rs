//! Training data in object stores, read from an S3-compatible server (the `s3s-fs` crate) that the suite starts, and through a line that
//! breaks: what comes is what the same files give on this machine.
//!
//! `cargo test -p marimba-tests --features remote --test remote`. Addresses and keys are given as the providers' own variables, which can only
//! be set for a new process: `object_stores` starts itself again for each of its parts.

#![allow(clippy::unwrap_used)] // a test that cannot go on has failed

#[cfg(not(feature = "remote"))]
#[test]
fn object_stores() {
    let data = marimba_dsl::data::Data::Tokens(marimba_dsl::data::Tokens {
        path: "s3://bucket/shards".into(),
        ..Default::default()
    });
    let all = marimba_experiments::data::Worker::ALL;
    let refused = marimba_experiments::data::open(&data, 8, 1, all).map(|_| ());
    let said = refused.unwrap_err().to_string();
    assert!(said.contains("--features remote"), "{said}");
    eprintln!("skipped: object stores are read only with `--features remote`");
}

#[cfg(feature = "remote")]
mod stores {
    use marimba_dsl::data::{Data, OnBad, Text, Tokens};
    use marimba_experiments::data::prepare::{PrepareSpec, prepare};
    use marimba_experiments::data::source::format::Columns;
    use marimba_experiments::data::source::shards::ShardDocs;
    use marimba_experiments::data::{DataError, Worker, open, tokenizer};
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Where the children find the files themselves.
    const ROOT: &str = "MARIMBA_TEST_ROOT";

    /// Which part a child runs.
    const PART: &str = "MARIMBA_TEST_PART";

    /// What is tried in a process of its own, whose store is elsewhere each time.
    const PARTS: [(&str, fn()); 3] = [
        (
            "what comes is what the files hold",
            what_comes_is_what_the_files_hold,
        ),
        ("nothing there", nothing_there),
        ("nobody answers", nobody_answers),
    ];

    /// Serves the folders of `root` as buckets; to anybody, or to who has the key.
    fn serve(root: &Path, with_key: bool) -> SocketAddr {
        use hyper_util::rt::{TokioExecutor, TokioIo};
        let mut builder =
            s3s::service::S3ServiceBuilder::new(s3s_fs::FileSystem::new(root).unwrap());
        if with_key {
            builder.set_auth(s3s::auth::SimpleAuth::from_single("key", "secret"));
        }
        let service = builder.build();
        let (told, addr) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async move {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                told.send(listener.local_addr().unwrap()).unwrap();
                let http = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                loop {
                    let (socket, _) = listener.accept().await.unwrap();
                    let served = http.serve_connection(TokioIo::new(socket), service.clone());
                    let served = served.into_owned();
                    tokio::spawn(async move { drop(served.await) });
                }
            });
        });
        addr.recv().unwrap()
    }

    /// A line to `server` on which every second connection breaks after 150,000 bytes of answers, every fifth at once.
    fn broken_line(server: SocketAddr) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let number = AtomicUsize::new(0);
            for client in listener.incoming() {
                let (mut client, n) = (client.unwrap(), number.fetch_add(1, Ordering::Relaxed));
                let most = match n {
                    n if n % 5 == 4 => 0,
                    n if n % 2 == 1 => 150_000,
                    _ => usize::MAX,
                };
                let mut upstream = TcpStream::connect(server).unwrap();
                let (mut up_from, mut up_to) =
                    (client.try_clone().unwrap(), upstream.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut up_from, &mut up_to);
                    let _ = up_to.shutdown(Shutdown::Write);
                });
                std::thread::spawn(move || {
                    let (mut left, mut piece) = (most, [0; 8192]);
                    while left > 0 {
                        match upstream.read(&mut piece) {
                            Ok(n) if n > 0 && client.write_all(&piece[..n.min(left)]).is_ok() => {
                                left -= n.min(left)
                            }
                            _ => break,
                        }
                    }
                    let _ = client.shutdown(Shutdown::Both);
                    let _ = upstream.shutdown(Shutdown::Both);
                });
            }
        });
        addr
    }

    /// Runs a part in a process whose store is at `endpoint`.
    fn child(part: fn(), root: &Path, endpoint: SocketAddr) {
        let same = |p: &&(&str, fn())| std::ptr::fn_addr_eq(p.1, part);
        let (name, _) = PARTS.iter().find(same).unwrap();
        let ran = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "stores::object_stores", "--nocapture"])
            .env(PART, name)
            .env(ROOT, root)
            .env("AWS_ACCESS_KEY_ID", "key")
            .env("AWS_SECRET_ACCESS_KEY", "secret")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ENDPOINT", format!("http://{endpoint}"))
            .env("AWS_ALLOW_HTTP", "true")
            .env("TMPDIR", root)
            .output()
            .unwrap();
        let said = [ran.stdout, ran.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(
            ran.status.success() && said.contains("1 passed"),
            "{name}: {said}"
        );
    }

    fn lines(file: usize) -> String {
        let line = |i: usize| {
            format!(
                "{{\"text\":\"file {file} line {i} {}\"}}\n",
                "word ".repeat(i % 90)
            )
        };
        (0..3000).map(line).collect()
    }

    fn prepared(inputs: &Path, out: &Path) -> Result<ShardDocs, DataError> {
        let spec = PrepareSpec {
            inputs: vec![inputs.into()],
            out: out.into(),
            tokenizer: tokenizer::load(None)?,
            vocab_size: None,
            columns: Columns::default(),
            shard: (0, 1),
            on_bad: OnBad::Skip,
        };
        prepare(&spec, &mut |_| ())?;
        ShardDocs::open(out)
    }

    /// A bucket with files of several formats below `in`, and shards of them below `shards`.
    fn fill(root: &Path) {
        let input = root.join("bucket/in");
        std::fs::create_dir_all(input.join("more")).unwrap();
        std::fs::write(input.join("a.jsonl"), lines(0)).unwrap();
        std::fs::write(input.join(".hidden"), "no data").unwrap();
        std::fs::write(
            input.join("more/text.txt"),
            "A line.\nAnother.\n\n".repeat(9000),
        )
        .unwrap();
        let gz = std::fs::File::create(input.join("b.jsonl.gz")).unwrap();
        let mut gz = flate2::write::GzEncoder::new(gz, flate2::Compression::fast());
        gz.write_all(lines(1).as_bytes()).unwrap();
        gz.finish().unwrap();
        let tokens: Vec<u8> = (0..50_000u32)
            .flat_map(|i| ((i * 7 % 250) as u16).to_le_bytes())
            .collect();
        std::fs::write(input.join("m.bin"), tokens).unwrap();
        let mut idx = b"MMIDIDX\0\0".to_vec();
        idx.extend(1u64.to_le_bytes());
        idx.push(8);
        idx.extend(500u64.to_le_bytes());
        idx.extend(501u64.to_le_bytes());
        (0..500).for_each(|_| idx.extend(100i32.to_le_bytes()));
        (0..500u64).for_each(|i| idx.extend((200 * i).to_le_bytes()));
        (0..=500u64).for_each(|i| idx.extend(i.to_le_bytes()));
        std::fs::write(input.join("m.idx"), idx).unwrap();
        prepared(&input, &root.join("bucket/shards")).unwrap();
    }

    #[test]
    fn object_stores() {
        if let Ok(name) = std::env::var(PART) {
            let (_, part) = PARTS.iter().find(|p| p.0 == name).unwrap();
            return part();
        }
        let dir = tempfile::tempdir().unwrap();
        fill(dir.path());
        let server = serve(dir.path(), true);
        child(what_comes_is_what_the_files_hold, dir.path(), server);
        child(
            what_comes_is_what_the_files_hold,
            dir.path(),
            broken_line(server),
        );
        child(nothing_there, dir.path(), server);
        // Nobody listens on a port that was just given back.
        let gone = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        child(nobody_answers, dir.path(), gone);
        let open_to_all = serve(dir.path(), false);
        let url = PathBuf::from(format!("http://{open_to_all}/bucket/in/a.jsonl"));
        let out = dir.path().join("from-web");
        let web = prepared(&url, &out).unwrap();
        assert_eq!(web.manifest().docs, 3000);
    }

    fn what_comes_is_what_the_files_hold() {
        let root = PathBuf::from(std::env::var_os(ROOT).unwrap());
        let out = tempfile::tempdir().unwrap();
        let here = ShardDocs::open(&root.join("bucket/shards")).unwrap();
        let there = prepared(Path::new("s3://bucket/in"), out.path()).unwrap();
        let parts = |d: &ShardDocs| -> Vec<_> {
            let of = |p: &marimba_experiments::data::source::shards::Part| {
                (p.docs, p.tokens, p.tok_crc32c, p.idx_crc32c, p.bad)
            };
            d.manifest().parts.iter().map(of).collect()
        };
        assert_eq!(parts(&there), parts(&here));
        assert_eq!(there.manifest().parts.len(), 4);
        ShardDocs::open(Path::new("s3://bucket/shards"))
            .unwrap()
            .verify()
            .unwrap();

        let tokens = |path: &Path| {
            Data::Tokens(Tokens {
                path: path.into(),
                on_bad: Some(OnBad::Skip),
                ..Tokens::default()
            })
        };
        let text = |path: &Path| {
            Data::Text(Text {
                path: path.into(),
                lanes: Some(8),
                ..Text::default()
            })
        };
        let pairs = [
            (
                tokens(&root.join("bucket/shards")),
                tokens(Path::new("s3://bucket/shards")),
            ),
            (
                text(&root.join("bucket/in/a.jsonl")),
                text(Path::new("s3://bucket/in/a.jsonl")),
            ),
        ];
        for (here, there) in pairs {
            let open = |d| open::open_pipeline(d, 64, 3, Worker::ALL).unwrap();
            let (mut a, mut b) = (open(&here), open(&there));
            use marimba_experiments::data::Loader;
            for _ in 0..6 {
                let (want, got) = (a.next(40).unwrap(), b.next(40).unwrap());
                assert_eq!((want.tokens, want.segments), (got.tokens, got.segments));
            }
            let mut again = open(&there);
            again.restore(&b.state()).unwrap();
            assert_eq!(again.next(40).unwrap().tokens, a.next(40).unwrap().tokens);
            assert_eq!(
                b.skip_counts()[0].bad,
                0,
                "a broken line is no damaged document"
            );
        }
    }

    fn nothing_there() {
        let out = tempfile::tempdir().unwrap();
        let said = |url: &str| {
            prepared(Path::new(url), out.path())
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        assert!(
            said("s3://bucket/none").contains("no data files at s3://bucket/none"),
            "{}",
            said("s3://bucket/none")
        );
        assert!(said("s3:///x").contains("names no bucket"));
        assert!(said("http://127.0.0.1/a?b").contains("query"));
        let out_there = prepared(Path::new("s3://bucket/in"), Path::new("s3://bucket/out"));
        assert!(
            out_there
                .map(|_| ())
                .unwrap_err()
                .to_string()
                .contains("folder of this machine")
        );
    }

    /// Takes a minute: the patience with a store.
    fn nobody_answers() {
        let error = ShardDocs::open(Path::new("s3://bucket/shards"))
            .map(|_| ())
            .unwrap_err();
        assert!(!error.is_of_document());
        let said = error.to_string();
        assert!(
            said.starts_with("cannot read s3://bucket/shards/manifest.json: ")
                && said.contains("retries"),
            "{said}"
        );
    }
}
