package engine

import (
	"context"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// minMajor is the oldest major version of Redis that the scripts run on.
const minMajor = 5

// Health asks the server, or each master of a cluster, for its INFO, and gives notice of dangers to quotas:
// "eviction" if the policy of eviction is not noeviction, "evicted" if keys were evicted since the last call,
// "version" if a server is too old. Before, it learns anew whether the address is one server. It fails as a
// decision does, and with ErrMisconfigured if a server does not compute as the scripts need it.
func (s *Store) Health(ctx context.Context) (driver.Health, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return driver.Health{}, err
	}
	if s.warmer != nil {
		if err := s.await(ctx, &s.unnamed, s.o.Prefix+"{health}"); err != nil {
			return driver.Health{}, err
		}
	}
	s.learn(ctx)
	infos, err := s.client.Info(ctx)
	if err != nil {
		return driver.Health{}, err
	}
	if err := s.probeNodes(ctx); err != nil {
		return driver.Health{}, err
	}
	var h driver.Health
	for _, info := range infos {
		if kind, v := software(info); h.Version == "" || major(v) < major(h.Version) {
			h.Kind, h.Version = kind, v
		}
		if p := infoField(info, "maxmemory_policy"); p != "" && p != "noeviction" {
			h.Eviction = p
		}
		n, _ := strconv.ParseInt(infoField(info, "evicted_keys"), 10, 64)
		h.Evicted += n
	}
	if h.Eviction != "" {
		s.notice("eviction", fmt.Sprintf("maxmemory_policy is %s: it may drop quotas in use; set it to noeviction", h.Eviction))
	}
	if before := s.evicted.Swap(h.Evicted); h.Evicted > before {
		s.notice("evicted", fmt.Sprintf("the server evicted %d keys: quotas among them are whole again too early", h.Evicted-before))
	}
	if h.Kind == "redis" && major(h.Version) < minMajor {
		s.notice("version", fmt.Sprintf("the server's version is %q; accepted: %d and later", h.Version, minMajor))
	}
	s.seen.Store(&h)
	return h, nil
}

// Readings tells how many scripts decided calls, the numbers of the compare-and-swap store, and those of the last Health.
func (s *Store) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricBatches, Value: s.batches.Load()})
	tell(driver.Reading{Metric: driver.MetricBatchedCalls, Value: s.batched.Load()})
	driver.Readings(s.cas, tell)
	s.seen.Load().Readings(tell)
}

// software returns the kind of a server and its own version. Most servers other than Redis tell in redis_version the
// version that they claim to match.
func software(info string) (kind, version string) {
	for _, kind := range []string{"valkey", "dragonfly", "garnet", "kvrocks", "keydb"} {
		if v := infoField(info, kind+"_version"); v != "" {
			return kind, v
		}
	}
	version = infoField(info, "redis_version")
	switch name := infoField(info, "server_name"); {
	case version == "":
		return "", ""
	case name != "":
		return name, version
	case strings.Contains(infoField(info, "executable"), "keydb-server"), infoField(info, "mvcc_depth") != "":
		return "keydb", version
	}
	return "redis", version
}

// notice gives a notice to the store's own receiver, or else to those of the policies around it.
func (s *Store) notice(name, text string) {
	n := quota.Notice{Name: name, Text: text}
	if s.o.Notice != nil {
		tell(s.o.Notice, n)
		return
	}
	for _, r := range s.reporting() {
		if r.Notice != nil {
			tell(r.Notice, n)
		}
	}
}

// tell gives a notice to a receiver. If that panics, slog gets the panic: no call is to blame for it.
func tell(receiver func(quota.Notice), n quota.Notice) {
	err := Catch("the receiver of notices", false, func() error { receiver(n); return nil })
	if err != nil {
		slog.Error("redis: a receiver of notices panicked", "err", err)
	}
}

// Report has the store call these functions from now on.
func (s *Store) Report(r driver.Reports) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reports = append(s.reports, r)
}

func (s *Store) reporting() []driver.Reports {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.reports
}

func infoField(info, name string) string {
	for line := range strings.Lines(info) {
		if value, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func major(version string) int {
	first, _, _ := strings.Cut(strings.TrimLeft(version, "dfv-"), ".") // Dragonfly's is df-v1.40.1
	n, _ := strconv.Atoi(first)
	return n
}
