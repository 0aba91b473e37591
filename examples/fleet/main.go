// Command fleet runs a small fleet of agents under shared quotas and shows it live.
//
//	go run ./examples/fleet              five seconds in the memory of this process
//	go run ./examples/fleet -for 30s     longer
//
// Agents work in teams. Each call of an agent is charged to four limits at once, all or nothing: the tokens
// and the requests of the agent, and the tokens of its team and of the fleet. Some jobs know their real cost
// only when they are done, and settle their estimate then. At the end a table counts the offered, admitted
// and denied calls, the denied ones by the limit that denied them (of several limits, the one that denies
// longest). A check goes through all admitted charges: the exit status is 1 if any limit was exceeded over
// any interval.
//
// With REDIS_URL set, the quotas are in Redis, and several of these processes share them. Give the processes
// of one run the same -run, which separates them from other runs, and check their ledgers together:
//
//	go run ./examples/fleet -run a -ledger 1.jsonl &
//	go run ./examples/fleet -run a -ledger 2.jsonl & wait
//	go run ./examples/fleet -check 1.jsonl 2.jsonl
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr, openStore)
	stop()
	os.Exit(code)
}

// openStore opens the store that REDIS_URL describes, or one in memory.
func openStore(ctx context.Context) (store quota.Store, name string, err error) {
	url := os.Getenv("REDIS_URL")
	if url == "" {
		url = "memory://"
	}
	if store, err = backend.Open(ctx, url); err != nil {
		return nil, "", fmt.Errorf("REDIS_URL: %w", err)
	}
	name, _, _ = strings.Cut(url, "://") // the remainder may hold a password
	return store, name, nil
}

type options struct {
	length        time.Duration
	teams, agents int
	run           string
	ledger        string
	check         bool
	files         []string
}

func parseOptions(args []string, stderr io.Writer) (o options, err error) {
	flags := flag.NewFlagSet("fleet", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.DurationVar(&o.length, "for", 5*time.Second, "how long the agents work")
	flags.IntVar(&o.teams, "teams", 4, "number of teams, 1 to 20")
	flags.IntVar(&o.agents, "agents", 5, "agents in each team, 1 to 50")
	flags.StringVar(&o.run, "run", "", "prefix of the keys: runs with different ones share no quota")
	flags.StringVar(&o.ledger, "ledger", "", "write all charges to this `file`, as JSON lines")
	flags.BoolVar(&o.check, "check", false, "check the ledgers named as arguments together, without a run")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	o.files = flags.Args()
	switch {
	case o.check && len(o.files) == 0:
		err = errors.New("-check needs the names of ledgers")
	case !o.check && len(o.files) > 0:
		err = fmt.Errorf("unexpected argument %q", o.files[0])
	case o.length <= 0:
		err = fmt.Errorf("-for is %v; accepted: a duration above 0, such as 5s", o.length)
	case o.teams < 1 || o.teams > 20:
		err = fmt.Errorf("-teams is %d; accepted: 1 to 20", o.teams)
	case o.agents < 1 || o.agents > 50:
		err = fmt.Errorf("-agents is %d; accepted: 1 to 50", o.agents)
	case strings.Contains(o.run, "/") || len(o.run) > 100 || quota.CheckKey(o.run+"fleet") != nil:
		err = fmt.Errorf("-run is %q; accepted: up to 100 bytes of UTF-8 without '/'", o.run)
	}
	if err != nil {
		fmt.Fprintln(stderr, "fleet:", err)
	}
	return o, err
}

// run is the program; it returns the exit status.
func run(ctx context.Context, args []string, stdout, stderr io.Writer, open func(context.Context) (quota.Store, string, error)) int {
	o, err := parseOptions(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		return 2
	}
	if o.check {
		entries, err := readLedgers(o.files)
		if err != nil {
			fmt.Fprintln(stderr, "fleet:", err)
			return 1
		}
		return report(stdout, check(entries))
	}
	store, name, err := open(ctx)
	if err != nil {
		fmt.Fprintln(stderr, "fleet:", err)
		return 1
	}
	defer store.Close()
	var file *os.File
	if o.ledger != "" {
		if file, err = os.Create(o.ledger); err != nil {
			fmt.Fprintln(stderr, "fleet:", err)
			return 1
		}
		defer file.Close()
	}

	f, err := newFleet(store, o)
	if err != nil {
		fmt.Fprintln(stderr, "fleet:", err)
		return 1
	}
	work, cancel := context.WithTimeout(ctx, o.length)
	defer cancel()
	done := make(chan struct{})
	go func() {
		f.work(work)
		close(done)
	}()
	newScreen(stdout, f, name, o.length).follow(done)

	printTable(stdout, f)
	if file != nil {
		if err := writeLedger(file, f.entries); err != nil {
			fmt.Fprintln(stderr, "fleet:", err)
			return 1
		}
	}
	return report(stdout, check(f.entries))
}

func writeLedger(file *os.File, entries []entry) error {
	w := bufio.NewWriter(file)
	if err := encode(w, entries); err != nil {
		return err
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return file.Close()
}
