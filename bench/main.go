// Command bench compares this library with others on the same work, and writes the figures as tables and charts.
// It is a module of its own, so that the other libraries are not among this library's dependencies.
//
//	go -C bench run .          # about half an hour: writes RESULTS.md and charts/
//	go -C bench run . -quick   # every measurement once and briefly: it shows that bench works, the figures are useless
//
// It needs Go, and for the comparison on Redis redis-server 7.0 or newer in the PATH; it starts its own servers on
// free loopback ports; for the comparison on PostgreSQL it needs that. -only chooses sections, such as redis,callers, and the
// files then have no others. -out is the directory to write to. -docs names a page between whose markers the headlines go.
//
// Every subject comes once in every count, in a new random order, so that other load on the machine affects all
// subjects alike. Against Redis and with request ids, all subjects are open at once and a count is four short turns of each: a
// virtual machine may be half as fast a second later. The figures are medians over the counts, or turns. A subject that fails, or does not come to an end, is
// reported as failed, and the others go on.
//
// With one goroutine or a few on Redis a decision is as long as its round trip, and that depends on whether client and
// server are woken on one processor or on two. So such rows come twice: with both kept on one processor, and with a
// processor for each. That needs Linux; elsewhere these rows are left out, and the report says so.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/internal/redisserver"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// sectionNames are the sections that -only chooses from, in their order in the report.
var sectionNames = []string{"local", "http", "ids", "redis", "callers", "job", "cluster", "latency", "growth", "postgres"}

func run(ctx context.Context, args []string, log io.Writer) error {
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	var (
		quick  = flags.Bool("quick", false, "measure everything once and briefly; the figures are useless")
		only   = flags.String("only", strings.Join(sectionNames, ","), "the `sections` to run")
		out    = flags.String("out", ".", "the `directory` for RESULTS.md and charts/")
		docs   = flags.String("docs", "", "a `page` between whose markers the headlines go")
		counts = flags.Int("count", 5, "how often everything is measured")
		long   = flags.Duration("time", 200*time.Millisecond, "how long one measurement takes")
		limit  = flags.Duration("limit", time.Minute, "after how long a subject that does not come to an end is given up")
	)
	if err := flags.Parse(args); err != nil {
		return err
	}
	chosen := strings.Split(*only, ",")
	for _, name := range chosen {
		if !slices.Contains(sectionNames, name) {
			return fmt.Errorf("-only %q; accepted: %s", name, strings.Join(sectionNames, ","))
		}
	}
	if *counts < 1 || *long <= 0 || *limit <= 0 || flags.NArg() > 0 {
		return fmt.Errorf("-count, -time and -limit must be positive, and there are no other arguments; got %d, %v, %v and %q", *counts, *long, *limit, flags.Args())
	}
	r := &runner{ctx: ctx, log: log, counts: *counts, long: *long, limit: *limit, size: full, endless: map[string]error{}}
	if *quick {
		r.counts, r.long, r.size = 1, 4*time.Millisecond, small
	}
	machine := thisMachine(time.Now())
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	started := time.Now()

	if slices.Contains(chosen, "local") {
		r.local()
	}
	if slices.Contains(chosen, "http") {
		r.http()
	}
	if slices.Contains(chosen, "postgres") {
		if err := pgserver.Available(); err != nil {
			r.miss("PostgreSQL: " + err.Error())
		} else if err := r.onPostgres(dir, &machine); err != nil {
			return err
		}
	}
	if slices.Contains(chosen, "ids") {
		r.ids(localIDSubjects, nil, "local", 1, r.size.many())
	}
	if chosen = slices.DeleteFunc(chosen, func(s string) bool { return s == "local" || s == "http" || s == "postgres" }); len(chosen) > 0 {
		if err := redisserver.Available(); err != nil {
			r.miss("Redis: there is no redis-server: " + err.Error())
		} else if err := r.onServers(dir, chosen, &machine); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		r.miss("the rest, after an interruption")
	}
	machine.took, machine.counts, machine.size = time.Since(started), r.counts, r.size
	return write(*out, *docs, &report{machine, &r.results, r.missed})
}

// onPostgres runs the section that needs PostgreSQL.
func (r *runner) onPostgres(dir string, m *machine) error {
	at, version, stop, err := launchPostgres()
	if err != nil {
		return err
	}
	defer stop()
	m.postgres = version
	var beside *target
	if redisserver.Available() == nil {
		var stop func()
		if beside, stop, err = launchServer(dir); err != nil {
			return err
		}
		defer stop()
	}
	r.postgres(at, beside)
	return nil
}

// onServers runs the sections that need Redis.
func (r *runner) onServers(dir string, chosen []string, m *machine) error {
	if err := canPin(); err != nil {
		r.miss("1 to 4 goroutines on Redis: " + err.Error())
	} else {
		r.placements = []placement{onOne, onTwo}
	}
	if slices.ContainsFunc(chosen, func(s string) bool { return s != "cluster" }) {
		at, stop, err := launchServer(dir)
		if err != nil {
			return err
		}
		defer stop()
		info, err := at.masters[0].Info("server")
		if err != nil {
			return err
		}
		m.redis = info["redis_version"]
		for _, section := range chosen {
			switch section {
			case "ids":
				r.ids(redisIDSubjects, at, "Redis", r.size.many())
			case "redis":
				r.redis(at)
				if _, err := exec.LookPath("redis-benchmark"); err != nil {
					r.miss("redis-benchmark: it is not in the PATH")
				} else {
					r.redisBenchmarks(at)
				}
			case "callers":
				r.callers(at)
			case "job":
				r.job("job", at)
			case "latency":
				r.latency(at)
			case "growth":
				r.growth(at)
			}
		}
		stop()
	}
	if onCluster := []string{"cluster", "job"}; slices.ContainsFunc(chosen, func(s string) bool { return slices.Contains(onCluster, s) }) && r.ctx.Err() == nil {
		at, stop, err := launchCluster(filepath.Join(dir, "cluster"))
		if err != nil {
			return err
		}
		defer stop()
		if slices.Contains(chosen, "job") {
			r.job("cluster job", at)
		}
		if slices.Contains(chosen, "cluster") {
			r.cluster(at)
		}
	}
	return nil
}
