package driver

import (
	"iter"

	"github.com/fleetquota/fleetquota/quota"
)

// A Metric is a number that a store, or a policy around one, tells of itself, see [Measured]. A counter counts since the store
// or policy was made, and does not go back; the others, gauges, are of this moment. Readings of one metric may be added up, over
// nodes and over the parts of a store.
type Metric uint8

// The metrics. Their names, for all observers, are those that String returns.
const (
	// MetricKeys is the keys that a store in memory holds, with those that are whole again and not yet swept.
	MetricKeys Metric = iota
	// MetricMaxKeys is the most keys that such a store may hold.
	MetricMaxKeys
	// MetricIDs is the request ids that such a store remembers.
	MetricIDs
	// MetricSweptKeys counts the keys and request ids that a store removed because they are needed no longer.
	MetricSweptKeys
	// MetricFullCalls counts the calls that were refused because a store in memory had no room for a key or a request id.
	MetricFullCalls
	// MetricBatches counts the scripts or transactions that a store sent to decide calls, failed ones included.
	MetricBatches
	// MetricBatchedCalls counts the calls that these decided, a list as one: over the batches it is the size of a batch.
	MetricBatchedCalls
	// MetricOvertaken counts the transactions and swaps that another process overtook.
	MetricOvertaken
	// MetricServers is 1 for a server that has told its software and version, as Health saw it last.
	MetricServers
	// MetricEvictedKeys counts the keys that the servers evicted since they started, as Health saw it last.
	MetricEvictedKeys
	// MetricLeaseKeys is the keys that a store of leases watches.
	MetricLeaseKeys
	// MetricLeaseHits counts the charges that leases decided without asking the store below.
	MetricLeaseHits
	// MetricChunks counts the chunks of quota that were leased.
	MetricChunks
	// MetricChunkTokens counts the tokens of these chunks: over the chunks it is the size of a chunk.
	MetricChunkTokens
	// MetricReturnedTokens counts the tokens of chunks that were given back unused.
	MetricReturnedTokens
	// MetricBreakersClosed is 1 for a breaker that is closed, else 0.
	MetricBreakersClosed
	// MetricBreakersHalfOpen is 1 for a breaker that is half-open, which lets probes through, else 0.
	MetricBreakersHalfOpen
	// MetricBreakersOpen is 1 for a breaker that is open, which refuses calls, else 0.
	MetricBreakersOpen
	// MetricBreakerOpenings counts how often breakers opened, or opened again after a probe.
	MetricBreakerOpenings
	// MetricBreakerRefusals counts the calls that breakers refused.
	MetricBreakerRefusals
	// MetricBulkheadCalls is the calls in flight in a bulkhead.
	MetricBulkheadCalls
	// MetricMaxBulkheadCalls is the most calls that a bulkhead lets be in flight.
	MetricMaxBulkheadCalls
	// MetricBulkheadRefusals counts the calls that bulkheads refused.
	MetricBulkheadRefusals
	// MetricTimeouts counts the calls whose time a timeout found to be over.
	MetricTimeouts
	// MetricAbandonedCalls is the calls that a timeout or their caller left, and that have not ended.
	MetricAbandonedCalls
	// MetricRetries counts the attempts after the first one, and hedges.
	MetricRetries
	// MetricDenialKeys is the denials that a memory of denials holds.
	MetricDenialKeys
	// MetricDenialHits counts the calls that a memory of denials denied without asking the store.
	MetricDenialHits
	// MetricDegraded is 1 while a policy decides in the store's place: a fallback, or one that fails open or closed; else 0.
	MetricDegraded
	// MetricDegradedCalls counts the calls that such a policy decided.
	MetricDegradedCalls
	// MetricFallbackKeys is the keys whose state a fallback keeps.
	MetricFallbackKeys
	// MetricMaxFallbackKeys is the most keys whose state a fallback may keep.
	MetricMaxFallbackKeys
	// MetricOwedTokens is the tokens that a fallback admitted and that are not yet charged to the store.
	MetricOwedTokens
	// MetricOwingKeys is the keys that owe such tokens.
	MetricOwingKeys
	// MetricReconciledTokens counts the tokens that a fallback admitted and that were charged to the store since.
	MetricReconciledTokens

	metricEnd
)

var metrics = [metricEnd]struct {
	name, help      string
	counter, byNode bool
}{
	MetricKeys:             {name: "store_keys", help: "The keys that a store in memory holds, with those that are whole again and not yet swept."},
	MetricMaxKeys:          {name: "store_max_keys", help: "The most keys that such a store may hold."},
	MetricIDs:              {name: "store_request_ids", help: "The request ids that such a store remembers."},
	MetricSweptKeys:        {name: "store_swept_keys", help: "The keys and request ids that a store removed because they are needed no longer.", counter: true},
	MetricFullCalls:        {name: "store_full_calls", help: "The calls that were refused because a store in memory had no room for a key or a request id.", counter: true},
	MetricBatches:          {name: "store_batches", help: "The scripts or transactions that a store sent to decide calls, failed ones included.", counter: true},
	MetricBatchedCalls:     {name: "store_batched_calls", help: "The calls that these decided, a list as one: over the batches it is the size of a batch.", counter: true},
	MetricOvertaken:        {name: "store_overtaken_batches", help: "The transactions and swaps that another process overtook.", counter: true},
	MetricServers:          {name: "server_info", help: "1 for a server that has told its software and version, as Health saw it last."},
	MetricEvictedKeys:      {name: "server_evicted_keys", help: "The keys that the servers evicted since they started, as Health saw it last.", counter: true},
	MetricLeaseKeys:        {name: "lease_keys", help: "The keys that a store of leases watches."},
	MetricLeaseHits:        {name: "lease_hits", help: "The charges that leases decided without asking the store below.", counter: true},
	MetricChunks:           {name: "lease_chunks", help: "The chunks of quota that were leased.", counter: true},
	MetricChunkTokens:      {name: "lease_chunk_tokens", help: "The tokens of these chunks: over the chunks it is the size of a chunk.", counter: true},
	MetricReturnedTokens:   {name: "lease_returned_tokens", help: "The tokens of chunks that were given back unused.", counter: true},
	MetricBreakersClosed:   {name: "breakers_closed", help: "1 for a breaker that is closed, else 0.", byNode: true},
	MetricBreakersHalfOpen: {name: "breakers_half_open", help: "1 for a breaker that is half-open, which lets probes through, else 0.", byNode: true},
	MetricBreakersOpen:     {name: "breakers_open", help: "1 for a breaker that is open, which refuses calls, else 0.", byNode: true},
	MetricBreakerOpenings:  {name: "breaker_openings", help: "How often breakers opened, or opened again after a probe.", counter: true, byNode: true},
	MetricBreakerRefusals:  {name: "breaker_refused_calls", help: "The calls that breakers refused.", counter: true, byNode: true},
	MetricBulkheadCalls:    {name: "bulkhead_calls", help: "The calls in flight in a bulkhead.", byNode: true},
	MetricMaxBulkheadCalls: {name: "bulkhead_max_calls", help: "The most calls that a bulkhead lets be in flight.", byNode: true},
	MetricBulkheadRefusals: {name: "bulkhead_refused_calls", help: "The calls that bulkheads refused.", counter: true, byNode: true},
	MetricTimeouts:         {name: "timeout_calls", help: "The calls whose time a timeout found to be over.", counter: true, byNode: true},
	MetricAbandonedCalls:   {name: "timeout_abandoned_calls", help: "The calls that a timeout or their caller left, and that have not ended.", byNode: true},
	MetricRetries:          {name: "retry_attempts", help: "The attempts after the first one, and hedges.", counter: true},
	MetricDenialKeys:       {name: "denial_memory_keys", help: "The denials that a memory of denials holds."},
	MetricDenialHits:       {name: "denial_memory_hits", help: "The calls that a memory of denials denied without asking the store.", counter: true},
	MetricDegraded:         {name: "degraded", help: "1 while a policy decides in the store's place: a fallback, or one that fails open or closed; else 0."},
	MetricDegradedCalls:    {name: "degraded_calls", help: "The calls that such a policy decided.", counter: true},
	MetricFallbackKeys:     {name: "fallback_keys", help: "The keys whose state a fallback keeps."},
	MetricMaxFallbackKeys:  {name: "fallback_max_keys", help: "The most keys whose state a fallback may keep."},
	MetricOwedTokens:       {name: "fallback_owed_tokens", help: "The tokens that a fallback admitted and that are not yet charged to the store."},
	MetricOwingKeys:        {name: "fallback_owing_keys", help: "The keys that owe such tokens."},
	MetricReconciledTokens: {name: "fallback_reconciled_tokens", help: "The tokens that a fallback admitted and that were charged to the store since.", counter: true},
}

// Metrics returns all metrics, in a fixed order.
func Metrics() iter.Seq[Metric] {
	return func(yield func(Metric) bool) {
		for m := range metricEnd {
			if !yield(m) {
				return
			}
		}
	}
}

// String returns the metric's name in lower case, such as "store_keys"; of a value that is no metric "unknown".
func (m Metric) String() string {
	if m >= metricEnd {
		return "unknown"
	}
	return metrics[m].name
}

// Help describes the metric in a sentence; "" for a value that is no metric.
func (m Metric) Help() string {
	if m >= metricEnd {
		return ""
	}
	return metrics[m].help
}

// Counter reports whether the metric is a counter, and not a gauge.
func (m Metric) Counter() bool { return m < metricEnd && metrics[m].counter }

// ByNode reports whether readings of the metric have a node.
func (m Metric) ByNode() bool { return m < metricEnd && metrics[m].byNode }

// A Reading is the value of a [Metric] of a part of a store.
type Reading struct {
	Metric Metric
	Value  int64
	// Node is the node of a [Placed] store whose policy tells this, as Placed names it; "" is the node that the store does not
	// know, or its only one. A node's counters are forgotten with the node.
	Node string
	// Fallback says that this is of the store that a fallback decides on, and not of the one in its inside.
	Fallback bool
	// Server and Version are Kind and Version of [Health], of MetricServers.
	Server, Version string
}

// A Measured is a store, or a policy around one, that tells numbers of itself. A store without this method has none.
type Measured interface {
	// Readings calls tell with the numbers of this part alone, without those of the store that Unwrap returns. It does no
	// I/O, and calls tell outside its locks. A metric may come several times; its readings add up.
	Readings(tell func(Reading))
}

// Readings calls tell with the numbers of a store and of all stores inside it: of the policies and the [Wrapper] around it, of
// the policies of each node, and of the store of a fallback. It may be called concurrently.
func Readings(s quota.Store, tell func(Reading)) {
	for s != nil {
		if m, ok := s.(Measured); ok {
			m.Readings(tell)
		}
		w, wraps := s.(Wrapper)
		if !wraps {
			return
		}
		s = w.Unwrap()
	}
}

// Readings calls tell with the numbers that a server told. A [HealthReporter] that is [Measured] tells those of its last Health.
// A nil *Health tells none.
func (h *Health) Readings(tell func(Reading)) {
	if h == nil {
		return
	}
	tell(Reading{Metric: MetricServers, Value: 1, Server: h.Kind, Version: h.Version})
	tell(Reading{Metric: MetricEvictedKeys, Value: h.Evicted})
}
