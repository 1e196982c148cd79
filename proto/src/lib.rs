//! The wire between router and shard, generated from `model_shard.proto`. Nothing else lives here.
#![allow(missing_docs, clippy::all)]

tonic::include_proto!("kvrun.v1");
