// What a start costs through containerd's own mount code: go test -run TestCost -socket PATH -containers N -layers L.
package conformance

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"testing"
	"time"

	"flag"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/mount"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/proxy"
	"google.golang.org/grpc"
)

var (
	containers = flag.Int("containers", 50, "how many starts")
	layers     = flag.Int("layers", 10, "layers of the image")
	inFlight   = flag.Int("in-flight", 1, "starts at the same time")
	mapped     = flag.Bool("mapped", true, "each in a user range of its own")
	mounting   = flag.Bool("mounting", true, "mount what is answered, as containerd does")
)

type sample struct{ prepare, mounts, mount, unmount, remove time.Duration }

func percentile(values []time.Duration, share float64) float64 {
	sort.Slice(values, func(i, j int) bool { return values[i] < values[j] })
	return float64(values[int(float64(len(values)-1)*share)].Microseconds()) / 1000
}

func start(ctx context.Context, sn snapshots.Snapshotter, i int, parent, work string) (s sample, err error) {
	key := fmt.Sprintf("%s-container-%d", parent, i)
	target := filepath.Join(work, fmt.Sprint(i))
	if err = os.Mkdir(target, 0700); err != nil {
		return s, err
	}
	labels := map[string]string{}
	if *mapped {
		mapping := fmt.Sprintf("0:%d:65536", 1000000+65536*(i%1000))
		labels["containerd.io/snapshot/uidmapping"] = mapping
		labels["containerd.io/snapshot/gidmapping"] = mapping
	}
	t0 := time.Now()
	if _, err = sn.Prepare(ctx, key, parent, snapshots.WithLabels(labels)); err != nil {
		return s, err
	}
	t1 := time.Now()
	mounts, err := sn.Mounts(ctx, key)
	if err != nil {
		return s, err
	}
	t2 := time.Now()
	if *mounting {
		if err = mount.All(mounts, target); err != nil {
			return s, err
		}
	}
	t3 := time.Now()
	if *mounting {
		if err = mount.UnmountAll(target, 0); err != nil {
			return s, err
		}
	}
	t4 := time.Now()
	if err = sn.Remove(ctx, key); err != nil {
		return s, err
	}
	return sample{t1.Sub(t0), t2.Sub(t1), t3.Sub(t2), t4.Sub(t3), time.Since(t4)}, os.Remove(target)
}

func TestCost(t *testing.T) {
	ctx := context.Background()
	connection, err := grpc.DialContext(ctx, "unix://"+*socket, grpc.WithBlock(), grpc.WithInsecure())
	if err != nil {
		t.Fatal(err)
	}
	sn := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "flatmount")
	work := t.TempDir()
	parent := ""
	for i := 0; i < *layers; i++ {
		key := fmt.Sprintf("cost-%d-%d", os.Getpid(), i)
		mounts, err := sn.Prepare(ctx, key, parent)
		if err != nil {
			t.Fatal(err)
		}
		if err := mount.WithTempMount(ctx, mounts, func(root string) error {
			return os.WriteFile(filepath.Join(root, fmt.Sprintf("file-%d", i)), []byte("content"), 0644)
		}); err != nil {
			t.Fatal(err)
		}
		parent = key + "-committed"
		if err := sn.Commit(ctx, parent, key); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < *inFlight; i++ {
		if _, err := start(ctx, sn, 1000000+i, parent, work); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(2 * time.Second)

	samples := make([]sample, *containers)
	var group sync.WaitGroup
	next := make(chan int)
	begun := time.Now()
	for w := 0; w < *inFlight; w++ {
		group.Add(1)
		go func() {
			defer group.Done()
			for i := range next {
				var err error
				if samples[i], err = start(ctx, sn, i, parent, work); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	for i := 0; i < *containers; i++ {
		next <- i
	}
	close(next)
	group.Wait()
	elapsed := time.Since(begun)

	phases := map[string]func(sample) time.Duration{
		"prepare": func(s sample) time.Duration { return s.prepare },
		"mounts":  func(s sample) time.Duration { return s.mounts },
		"mount":   func(s sample) time.Duration { return s.mount },
		"unmount": func(s sample) time.Duration { return s.unmount },
		"remove":  func(s sample) time.Duration { return s.remove },
		"calls":   func(s sample) time.Duration { return s.prepare + s.mounts + s.remove },
		"start":   func(s sample) time.Duration { return s.prepare + s.mounts + s.mount },
	}
	result := map[string]interface{}{"per_second": float64(*containers) / elapsed.Seconds()}
	for name, of := range phases {
		values := make([]time.Duration, len(samples))
		for i, s := range samples {
			values[i] = of(s)
		}
		result[name+"_ms"] = map[string]float64{"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}
	}
	line, _ := json.Marshal(result)
	fmt.Println(string(line))
}
