// A client of a snapshot service on the library that containerd itself calls with; words and answer as of
// snapshot_client.c:
//
//	snapshot_client SOCKET IN_FLIGHT CYCLES PARENT SNAPSHOTTER plain|mapped [closed|burst [CONNECTIONS]]
//
// A goroutine for each cycle under way. Built from Debian's packages of containerd's and gRPC's sources.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sort"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	snapshots "github.com/containerd/containerd/api/services/snapshots/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

const (
	calls           = 3
	mostInFlight    = 10000
	mostCycles      = 1000000
	mostConnections = 64
	pause           = 100 * time.Millisecond
	deadline        = 60 * time.Second
	mapping         = "0:1048576:65536"
	usage           = "usage: snapshot_client SOCKET IN_FLIGHT CYCLES PARENT SNAPSHOTTER plain|mapped [closed|burst [CONNECTIONS]]"
)

type load struct {
	socket, parent, snapshotter           string
	inFlight, cycles, connections, rounds int
	mapped                                bool
}

type figures struct {
	CallsPerSecond float64   `json:"calls_per_second"`
	P50            float64   `json:"p50_ms"`
	EachP50        []float64 `json:"each_p50_ms"`
	P99            float64   `json:"p99_ms"`
	EachP99        []float64 `json:"each_p99_ms"`
	Max            float64   `json:"max_ms"`
	EachMax        []float64 `json:"each_max_ms"`
	CPU            float64   `json:"cpu_us_per_call"`
}

// A cycle's three calls, each as long as its caller waited.
type cycle [calls]time.Duration

func die(format string, values ...interface{}) {
	fmt.Fprintf(os.Stderr, "snapshot_client: "+format+"\n", values...)
	os.Exit(1)
}

func parse(words []string) (of load, ok bool) {
	if len(words) < 6 || len(words) > 8 {
		return of, false
	}
	number := func(word string, most int) int {
		value, err := strconv.Atoi(word)
		if err != nil || value < 1 || value > most {
			return 0
		}
		return value
	}
	of = load{socket: words[0], parent: words[3], snapshotter: words[4], connections: 1, rounds: 1}
	of.inFlight, of.cycles = number(words[1], mostInFlight), number(words[2], mostCycles)
	of.mapped = words[5] == "mapped"
	if len(words) > 7 {
		of.connections = number(words[7], mostConnections)
	}
	if of.inFlight == 0 || of.cycles == 0 || of.connections == 0 || !of.mapped && words[5] != "plain" {
		return of, false
	}
	if len(words) > 6 && words[6] == "burst" {
		of.rounds = of.cycles / of.inFlight
		return of, of.rounds*of.inFlight == of.cycles
	}
	return of, len(words) == 6 || words[6] == "closed"
}

func connect(ctx context.Context, socket string) snapshots.SnapshotsClient {
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}
	connection, err := grpc.DialContext(ctx, "localhost", grpc.WithInsecure(), grpc.WithBlock(),
		grpc.FailOnNonTempDialError(true), grpc.WithContextDialer(dial))
	if err != nil {
		die("connect to %s: %v", socket, err)
	}
	return snapshots.NewSnapshotsClient(connection)
}

func (of *load) run(ctx context.Context, client snapshots.SnapshotsClient, number int) (took cycle) {
	key := fmt.Sprintf("bench-%d-%d", os.Getpid(), number)
	labels := map[string]string{"containerd.io/gc.root": "bench"} // containerd would collect it while we use it
	if of.mapped {
		labels["containerd.io/snapshot/uidmapping"] = mapping
		labels["containerd.io/snapshot/gidmapping"] = mapping
	}
	begun := time.Now()
	prepared, err := client.Prepare(ctx, &snapshots.PrepareSnapshotRequest{
		Snapshotter: of.snapshotter, Key: key, Parent: of.parent, Labels: labels,
	})
	if err != nil {
		die("Prepare of %s: %v", key, err)
	}
	at := time.Now()
	took[0], begun = at.Sub(begun), at
	mounts, err := client.Mounts(ctx, &snapshots.MountsRequest{Snapshotter: of.snapshotter, Key: key})
	if err != nil {
		die("Mounts of %s: %v", key, err)
	}
	at = time.Now()
	took[1], begun = at.Sub(begun), at
	if len(prepared.Mounts) == 0 || len(mounts.Mounts) == 0 {
		die("Prepare or Mounts of %s: no mounts", key)
	}
	_, err = client.Remove(ctx, &snapshots.RemoveSnapshotRequest{Snapshotter: of.snapshotter, Key: key})
	if err != nil {
		die("Remove of %s: %v", key, err)
	}
	took[2] = time.Since(begun)
	return took
}

// All cycles, and the time that they took without the pauses between bursts.
func (of *load) runAll(ctx context.Context, clients []snapshots.SnapshotsClient) ([]cycle, time.Duration) {
	took := make([]cycle, of.cycles)
	var next int64
	var busy time.Duration
	for round := 0; round < of.rounds; round++ {
		if round > 0 {
			time.Sleep(pause)
		}
		limit := int64(of.cycles / of.rounds * (round + 1))
		var group sync.WaitGroup
		begun := time.Now()
		for worker := 0; worker < of.inFlight; worker++ {
			group.Add(1)
			go func(client snapshots.SnapshotsClient) {
				defer group.Done()
				for {
					number := atomic.AddInt64(&next, 1) - 1
					if number >= limit {
						return
					}
					took[number] = of.run(ctx, client, int(number))
				}
			}(clients[worker%len(clients)])
		}
		group.Wait()
		busy += time.Since(begun)
		next = limit
	}
	return took, busy
}

func processorTime() time.Duration {
	var spent syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &spent); err != nil {
		die("getrusage: %v", err)
	}
	return time.Duration(spent.Utime.Nano() + spent.Stime.Nano())
}

func shares(values []time.Duration) (p50, p99, max float64) {
	sort.Slice(values, func(i, j int) bool { return values[i] < values[j] })
	share := func(of float64) float64 {
		return float64(values[int(float64(len(values)-1)*of)].Nanoseconds()) / 1e6
	}
	return share(0.5), share(0.99), share(1)
}

func main() {
	of, ok := parse(os.Args[1:])
	if !ok {
		fmt.Fprintln(os.Stderr, usage)
		os.Exit(2)
	}
	// Not a deadline of the calls: a call that has one says so to the service.
	time.AfterFunc(deadline, func() { die("%v have passed and not all cycles have ended", deadline) })
	ctx := metadata.AppendToOutgoingContext(context.Background(), "containerd-namespace", "default")
	clients := make([]snapshots.SnapshotsClient, of.connections)
	for i := range clients {
		clients[i] = connect(ctx, of.socket)
	}

	before := processorTime()
	took, busy := of.runAll(ctx, clients)
	spent := processorTime() - before

	count := float64(calls * len(took))
	result := figures{CallsPerSecond: count / busy.Seconds(), CPU: float64(spent.Nanoseconds()) / 1e3 / count}
	whole := make([]time.Duration, len(took))
	for call := 0; call < calls; call++ {
		each := make([]time.Duration, len(took))
		for i := range took {
			each[i] = took[i][call]
			whole[i] += took[i][call]
		}
		p50, p99, max := shares(each)
		result.EachP50, result.EachP99 = append(result.EachP50, p50), append(result.EachP99, p99)
		result.EachMax = append(result.EachMax, max)
	}
	result.P50, result.P99, result.Max = shares(whole)
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		die("%v", err)
	}
}
